"""What lies where at a remote, and which manifest has which number there.

qhub-remote.json            the format, and that the store was seen to create without replacing
blobs/sha256/ab/<hex>       files, lineages and manifests by digest: the same bytes are there once
versions/<name>/@<number>   a slot: which manifest has this number; created last and once, never replaced
"""

import contextlib
import json
import re
import uuid
from dataclasses import dataclass

from adapterhub_local.digests import hex_of, parse_digest
from adapterhub_local.durable import canonical_json
from adapterhub_local.errors import BadReference, Corrupt, InputError, QhubError
from adapterhub_local.refs import check_name
from adapterhub_local.registry.store import Store

MARKER = "qhub-remote.json"
FORMAT = 1
MAX_SLOT_BYTES = 4096
_SLOT = re.compile(r"@([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Slot:
    """A number of a name: its manifest, and the manifest it had under its first number, if that was another."""

    number: int
    manifest: str
    origin: str | None

    def to_bytes(self) -> bytes:
        return canonical_json({"manifest": self.manifest, "origin": self.origin})


def blob_path(digest: str) -> str:
    """The object with these bytes."""
    hexadecimal = hex_of(digest)
    return f"blobs/sha256/{hexadecimal[:2]}/{hexadecimal}"


def slot_path(name: str, number: int) -> str:
    """The object that says which manifest `name@number` is; no part of a name begins with '@'."""
    return f"versions/{name}/@{number}"


def check_format(store: Store) -> bool:
    """Whether there is something of qhub's. Raises InputError if a newer qhub made it, Corrupt if it is unreadable."""
    if store.size(MARKER) is None:
        return False
    try:
        number = int(json.loads(store.read(MARKER, MAX_SLOT_BYTES))["format"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Corrupt(f"{store.url}/{MARKER} cannot be read: is this a remote of qhub?") from None
    if number > FORMAT:
        raise InputError(f"{store.url} was written by a newer version of qhub: install that version or newer")
    return True


def prepare(store: Store) -> None:
    """Mark a new remote, once it was seen to keep its word: a store may take a condition and not heed it.

    Raises QhubError if it replaces what it was asked to keep.
    """
    if check_format(store):
        return
    probe = f"tmp/{uuid.uuid4().hex}"
    store.create(probe, b"first")
    heeded = not store.create(probe, b"other") and store.read(probe, 5) == b"first"
    store.remove(probe)
    if not heeded:
        raise QhubError(f"{store.url} replaces what it was asked to keep, so two people could overwrite one another's "
                        "versions: push to a folder or to a store that honours If-None-Match")  # fmt: skip
    store.create(MARKER, canonical_json({"format": FORMAT}))


def numbers_of(store: Store, name: str) -> list[int]:
    """The numbers of `name` that are taken, in order."""
    matches = (_SLOT.fullmatch(path) for path in store.names(f"versions/{name}"))
    return sorted(int(match[1]) for match in matches if match)


def all_numbers(store: Store) -> dict[str, list[int]]:
    """Name -> numbers, in order."""
    found: dict[str, list[int]] = {}
    for path in store.names("versions", deep=True):
        name, _, last = path.rpartition("/")
        if match := _SLOT.fullmatch(last):
            with contextlib.suppress(BadReference):  # whatever else lies there is not ours
                found.setdefault(check_name(name), []).append(int(match[1]))
    return {name: sorted(found[name]) for name in sorted(found)}


def read_slot(store: Store, name: str, number: int) -> Slot | None:
    """The slot of `name@number`, None if it is free. Raises Corrupt if it cannot be read."""
    path = slot_path(name, number)
    try:
        raw = store.read(path, MAX_SLOT_BYTES)
    except FileNotFoundError:
        return None
    try:
        fields = json.loads(raw)
        origin = fields["origin"]
        return Slot(number, parse_digest(fields["manifest"]), None if origin is None else parse_digest(origin))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Corrupt(f"{store.url}/{path} does not say which version it is: nothing was read") from None


def find_slot(store: Store, name: str, number: int, digests: set[str]) -> Slot | None:
    """The slot of the version with one of these manifests, which is `name@number` or was given a later number."""
    first = read_slot(store, name, number)
    if first is None or digests & {first.manifest, first.origin}:
        return first
    for later in numbers_of(store, name):
        if later > number:
            with contextlib.suppress(Corrupt):  # somebody's number all the same
                slot = read_slot(store, name, later)
                if slot and digests & {slot.manifest, slot.origin}:
                    return slot
    return None
