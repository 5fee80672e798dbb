"""The prompts of an adapter: from files that are given, or those its lineage names, found again by their digests."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_local.data.chat import Chat
from adapterhub_local.data.dataset import read_parts
from adapterhub_local.durable import digest_file
from adapterhub_local.errors import InputError
from adapterhub_local.evaluate.evaluate import data_settings
from adapterhub_local.recipe.objectives import ANY
from adapterhub_local.recipe.source import local_problem
from adapterhub_local.registry import Version
from adapterhub_local.router.features import first_asked

LEAST = 20  # different prompts of an adapter
HELD = 0.2  # of the prompts, for the temperature and the limits; as many again are measured on


@dataclass
class Prompts:
    """Different prompts of one adapter: learnt from, held back to calibrate, and measured on; with their files."""

    train: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def all(self) -> list[str]:
        return [*self.train, *self.held, *self.test]


def prompts_of(version: Version, given: Sequence[Path], folder: Path, limit: int) -> Prompts:
    """At most `limit` prompts of each file: of the files `given`, else of those of its lineage in `folder`.

    A file that was held out when the adapter was trained is measured on. Raises InputError that says what to give.
    """
    known = {entry.get("digest"): entry.get("role") for entry in version.lineage.get("data") or ()}
    files = list(given) or _found(version, folder)
    if not files:
        named = ", ".join(sorted({str(entry.get("file")) for entry in version.lineage.get("data") or ()}))
        wanted = f"{named} {'are' if ',' in named else 'is'} not in {folder}" if named else "its lineage names no file"
        raise InputError(
            f"the prompts of {version} are not here ({wanted}): give --data {version.name}=FILE, or --look-in FOLDER"
        )
    return read_prompts(files, f"{version}", limit, [version], known)


def read_prompts(
    files: Iterable[Path], whose: str, limit: int, versions: Sequence[Version] = (), roles: dict[Any, Any] | None = None
) -> Prompts:
    """The prompts in these files, divided by a hash of each, so that equal prompts fall to one part.

    `roles` says of a file's digest whether it is train or test. Raises InputError for too few, BadData.
    """
    texts: dict[str, bool] = {}  # text -> whether it was held out in training
    records = []
    for path in files:
        if problem := local_problem(path):
            raise InputError(f"the prompts of {whose}: {problem}")
        role = (roles or {}).get(digest_file(path)) if path.is_file() else None
        for part in read_parts([path], "test" if role == "test" else "train", data_settings(versions), limit, ANY):
            asked = [_asked(chat) for chat in part.chats]
            for text in asked:
                if text.strip():
                    texts[text] = texts.get(text, False) or role == "test"
            records.append({**part.record, "role": "prompts", "adapter": whose})
    found = Prompts(records=records)
    is_split = any(texts.values()) and not all(texts.values())
    for text, is_test in sorted(texts.items(), key=lambda item: _place(item[0])):
        place = _place(text)
        if is_test if is_split else place < HELD:
            found.test.append(text)
        elif place < HELD * (1 if is_split else 2):
            found.held.append(text)
        else:
            found.train.append(text)
    if len(texts) < LEAST or not all((found.train, found.held, found.test)):
        raise InputError(
            f"{whose} has {len(texts)} different prompts in {', '.join(sorted({one['file'] for one in records}))}: at "
            f"least {LEAST} are needed to learn from and to measure on"
        )
    return found


def _asked(chat: Chat) -> str:
    return chat.text if chat.text is not None else first_asked(chat.messages)


def _found(version: Version, folder: Path) -> list[Path]:
    """The files of a lineage that lie in `folder`, with the very bytes that the adapter was trained or scored on."""
    files = []
    for entry in version.lineage.get("data") or ():
        path = folder / Path(str(entry.get("file"))).name
        if path.is_file() and digest_file(path) == entry.get("digest"):
            files.append(path)
    return files


def _place(text: str) -> float:
    """A number from 0 to 1 that the text alone decides."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="backslashreplace")).digest()[:7]) / 2**56
