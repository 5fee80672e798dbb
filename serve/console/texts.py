"""Texts from elsewhere as pages show them: what hides or turns letters round is seen, and what is long is cut.

`shown` is applied to every value that a template writes. `exact` is for values that a form sends back: there an escape
would be another text, and a field shows its text apart from the page's.
"""

import hashlib
from typing import Any

from markupsafe import Markup, escape

from adapterhub_local.visible import visible

MAX_TEXT = 4000  # bytes of one text that a page shows
LINE = 160  # bytes of one text in a list


def shown(value: Any) -> Any:
    """A value as a template writes it; what is markup already was made by ours, of texts that are visible."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def exact(value: Any) -> Markup:
    """The value of a field, letter for letter, but for halves of characters, which no page can hold."""
    return escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def cut(value: Any, most: int = MAX_TEXT) -> str:
    """A text or a value that takes at most about `most` bytes of a page, with its length where more was there."""
    text = "" if value is None else str(value)
    head = whole = visible(text[:most])
    while (size := _size(head)) > most:  # an escape or a letter takes up to 10 bytes
        head = head[: len(head) * most // size]
    return head if head == whole and len(text) <= most else f"{head} … ({len(text):,} letters)"


def _size(text: str) -> int:
    return len(str(escape(text)).encode())


def seal(text: str) -> str:
    """What stands for a text in a form that replaces it: the page's and the newest can be compared, however long."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
