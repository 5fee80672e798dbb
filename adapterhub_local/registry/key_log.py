"""Keys of the server made and revoked with a record of who did it."""

from typing import Any

from adapterhub_local.keys import Key, Keys
from adapterhub_local.registry.journal import marking, note
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.rows import now


def create_key(registry: Registry, **wanted: Any) -> tuple[Key, str]:
    """A new key and its token, as `Keys.create`: nobody is given a token of which there is no record."""
    with marking(registry.database, registry.blobs) as db:
        key, token = Keys(registry.home).create(**wanted)
        note(db, "key", action="created", key=key.id, scopes=list(key.scopes), note=key.note, at=now())
    return key, token


def revoke_key(registry: Registry, identity: str) -> Key:
    """Refuse a key from now on, as `Keys.revoke`."""
    with marking(registry.database, registry.blobs) as db:
        key = Keys(registry.home).revoke(identity)
        note(db, "key", action="revoked", key=key.id, scopes=list(key.scopes), note=key.note, at=now())
    return key
