"""Evaluation on held-out chats: base against adapter."""
