"""What people look at: texts coloured by head, decoders side by side."""
