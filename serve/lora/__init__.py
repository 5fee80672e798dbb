"""Linear layers that add a different adapter to every token of a packed batch."""
