"""Hooks: a command or a URL that is notified of changes, after they happened and whatever becomes of it.

The journal is the queue: what a hook was notified of is kept beside it, so a crash at any moment loses nothing,
and a notification may come again under the same delivery id.
"""
