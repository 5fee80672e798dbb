"""Where a page of a list ended that is no table: the time and the id of its last entry, as the text of a cursor."""

import base64
import binascii
import json

from adapterhub_local.errors import InputError


def write_place(place: tuple[str, str]) -> str:
    """The cursor that stands for this place."""
    return base64.urlsafe_b64encode(json.dumps(place, separators=(",", ":")).encode()).decode().rstrip("=")


def read_place(text: str | None) -> tuple[str, str] | None:
    """The place that a cursor stands for, None for no cursor. Raises InputError for what is none of ours."""
    if not text:
        return None
    try:
        time, identity = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        if isinstance(time, str) and isinstance(identity, str):
            return time, identity
    except (ValueError, TypeError, binascii.Error, UnicodeError, RecursionError):
        pass
    raise InputError(f"{text[:40]!a} is not a place in a list: leave `after` out to begin at its start")
