"""What tests and benchmarks share: random pages with traps, naive float64 loops, error bounds, timing.

Nothing else in the package imports it. It needs no test framework: failures are `AssertionError`s.
"""
