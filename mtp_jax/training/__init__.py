"""The training state, the optimizer, and the one compiled step."""
