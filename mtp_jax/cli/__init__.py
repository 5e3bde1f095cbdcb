"""The command line: a thin file a verb, which parses, calls the library and prints."""
