"""Adapters of a running server: from a version's files to a slot on the accelerator, by content digest."""
