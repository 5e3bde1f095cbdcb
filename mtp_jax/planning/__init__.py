"""Planning: the training step compiled ahead of time for TPUs, and its cost."""
