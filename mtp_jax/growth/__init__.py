"""Heads for a model that is there: where they begin, and what they then cost."""
