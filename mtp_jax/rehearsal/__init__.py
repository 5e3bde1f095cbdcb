"""A pod in a laptop: a run on processes of this machine, and faults done to it."""
