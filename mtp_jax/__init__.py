"""Multi-token prediction for JAX: a shared trunk, n heads, one train step."""

__version__ = "0.1.0"
