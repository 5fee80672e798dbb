"""Metadata: what clients note beside what is logged, within the bounds that OpenAI documents."""

from typing import Any

from serve.errors import BadParameter

MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512


def check_metadata(value: Any) -> None:
    """Raise BadParameter unless it is a few short texts by name, or nothing."""
    if value is None:
        return
    is_small = isinstance(value, dict) and len(value) <= MAX_PAIRS
    if not is_small or not all(
        isinstance(text, str) and len(name) <= MAX_KEY and len(text) <= MAX_VALUE for name, text in value.items()
    ):
        raise BadParameter(
            f"metadata that is logged has at most {MAX_PAIRS} keys of {MAX_KEY} characters, each with a text of "
            f"{MAX_VALUE} characters",
            "metadata",
        )
