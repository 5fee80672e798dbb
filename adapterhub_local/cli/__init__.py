"""The command line: one file a verb, each parses, makes one library call and prints."""
