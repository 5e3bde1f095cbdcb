"""Models written in formats of other programs, read again before they count."""
