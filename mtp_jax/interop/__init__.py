"""Formats and names of other people's models, one file each."""
