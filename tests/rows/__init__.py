"""Tests of rows: chats as tokens."""
