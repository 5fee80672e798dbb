"""Small files among the blobs, of what was committed: `blobs/receipts/sentiment@3` holds the digest of that version,
and `blobs/changes/57` that of the record of the 57th change, be it the move of an alias or a removal.

The ledger lies beside the database, so both come back from one backup, while the blobs of later versions stay. These
files stay with them: a set of names cannot be made older by copying an older one over it. A receipt is written after
the line of the ledger, so whatever has one was committed; versions of an older qhub have none. Changes are numbered
(journal.py), so the last of them speaks for all: only so many are kept that whoever is late takes none away.
"""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote

from adapterhub_local.durable import create_shared, share_parents
from adapterhub_local.settings import Home

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SUBJECT = re.compile(r"\S{1,140}@[1-9][0-9]{0,10}")
_NUMBER = re.compile(r"[1-9][0-9]{0,10}")
_KEPT = 16  # of the last changes


class Receipts:
    """The receipts of one home."""

    def __init__(self, home: Home) -> None:
        self.folder = home.receipts
        self.changes = home.changes

    def count(self) -> int:
        """How many versions have one."""
        try:
            return len(os.listdir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def of(self, subject: str) -> list[str]:
        """The digests of the manifests that were committed as `name@3`: one, or more where a number was given twice."""
        return _digests(self._path(subject))

    def subjects(self) -> list[str]:
        """The versions that have one, in the order of their names."""
        try:
            names = sorted(os.listdir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [subject for name in names if _SUBJECT.fullmatch(subject := unquote(name))]

    def add(self, committed: Iterable[tuple[str, str]]) -> None:
        """Write those of these subjects and digests. That one is missing costs nothing but its protection."""
        for subject, digest in committed:
            with suppress(OSError):
                _enter(self._path(subject), digest)

    def last_change(self) -> tuple[int, list[str]]:
        """The number of the last change that has a receipt, 0 if none has, and the digests of its record."""
        number = max(self._numbers(), default=0)
        return number, _digests(self.changes / str(number))

    def add_changes(self, committed: Iterable[tuple[int, str]]) -> None:
        """Write those of these changes, numbers and digests of records, and take older ones away."""
        with suppress(OSError):
            for number, digest in committed:
                _enter(self.changes / str(number), digest)
            for number in sorted(self._numbers())[:-_KEPT]:
                (self.changes / str(number)).unlink(missing_ok=True)

    def _numbers(self) -> list[int]:
        try:
            return [int(name) for name in os.listdir(self.changes) if _NUMBER.fullmatch(name)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _path(self, subject: str) -> Path:
        return self.folder / quote(subject, safe="@")


def _enter(path: Path, digest: str) -> None:
    """Append a digest to a receipt that does not have it."""
    if digest not in _digests(path):
        share_parents(path.parent)
        create_shared(path)
        with open(path, "ab") as file:
            file.write(f"{digest}\n".encode())


def _digests(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return []
    return [line for line in text.split("\n") if _DIGEST.fullmatch(line)]
