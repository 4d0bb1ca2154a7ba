"""What made committed things; no part of the wheel. Run from the repository's root, it may import everything."""
