"""A training run: the loop, its log and files, where its time went, its audit."""
