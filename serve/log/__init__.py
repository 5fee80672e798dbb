"""The log of answers that asked for it, and of what their clients thought of them."""
