"""Reports for people: runs as pages, texts coloured by head, decoders side by side."""
