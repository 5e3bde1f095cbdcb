"""The training step compiled ahead of time for TPUs, and what its program holds."""
