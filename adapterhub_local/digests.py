"""Digests as this project writes them, `sha256:<64 hex digits>`: a type of their own, made and read here only."""

import re
from typing import NewType

Digest = NewType("Digest", str)  # a str in JSON, SQL and logs
PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
_PREFIX = "sha256:"


def parse_digest(value: object) -> Digest:
    """`value`, if it is a digest. Raises ValueError."""
    if not isinstance(value, str) or not PATTERN.fullmatch(value):
        raise ValueError(f"{value!r} is not a digest")
    return Digest(value)


def from_hex(hexadecimal: str) -> Digest:
    """The digest of these digits, which name a blob's file."""
    return Digest(_PREFIX + hexadecimal)


def hex_of(digest: str) -> str:
    """The digits of a digest."""
    return digest.removeprefix(_PREFIX)


def short(digest: str) -> str:
    """The beginning of a digest, long enough for a reference and short enough for a line: `sha256:0123456789ab`."""
    return digest[: len(_PREFIX) + 12]
