"""The kinds of prediction heads, one file each."""
