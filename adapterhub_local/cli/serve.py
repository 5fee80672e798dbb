"""`qhub serve`: the server's own command."""

from serve.__main__ import command

__all__ = ["command"]
