"""How many answers survive a method and a budget, and what was read for them: `sparsekv eval`."""
