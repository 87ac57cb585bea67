"""A run in the machine: the loop, its loaders, its state."""
