"""Texts that are named by their files: `data.chat_template` and `reward.python` of a recipe, `--chat-template` of a
base. No torch."""

import os
from pathlib import Path

from adapterhub_local.errors import InputError
from adapterhub_local.regular import read_regular

SUFFIXES = (".jinja", ".jinja2")
LONGEST = 1 << 20  # bytes, of a base's own template as well


def names_file(text: str) -> bool:
    """Whether a chat template is given as a file, and not by its name."""
    return text.endswith(SUFFIXES)


def names_code(text: str) -> bool:
    """Whether Python code is given as a file, and not as its text."""
    return "\n" not in text


def read_template(text: str, beside: Path) -> str:
    """What the file named by `text` holds, looked for beside the folder that names it. Raises InputError."""
    path = beside / os.path.expanduser(text)
    try:
        return read_regular(path, LONGEST).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is not UTF-8 text"
        raise InputError(f"{path} cannot be read: {reason}") from None
