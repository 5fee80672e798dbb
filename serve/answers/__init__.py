"""What is given back: whole bodies and events of each endpoint, as plain dictionaries."""
