"""Rows: chats as token ids, packed into rows without padding, and a model run on them."""
