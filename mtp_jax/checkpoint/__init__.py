"""Saving a training state, and restoring it or a model from it, on any mesh."""
