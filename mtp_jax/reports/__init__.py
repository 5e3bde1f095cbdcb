"""Reports for people: texts coloured by head, decoders side by side."""
