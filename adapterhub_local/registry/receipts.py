"""One small file among the blobs for each version that was committed: `blobs/receipts/sentiment@3` holds its digest.

The ledger lies beside the database, so both come back from one backup, while the blobs of later versions stay. These
files stay with them: a set of names cannot be made older by copying an older one over it. A receipt is written after
the line of the ledger, so whatever has one was committed; versions of an older qhub have none.
"""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote

from adapterhub_local.durable import create_shared, share_parents

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SUBJECT = re.compile(r"\S{1,140}@[1-9][0-9]{0,10}")


class Receipts:
    """The receipts of one home."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def count(self) -> int:
        """How many versions have one."""
        try:
            return len(os.listdir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def of(self, subject: str) -> list[str]:
        """The digests of the manifests that were committed as `name@3`: one, or more where a number was given twice."""
        try:
            text = self._path(subject).read_bytes().decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return []
        return [line for line in text.split("\n") if _DIGEST.fullmatch(line)]

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
                if digest not in self.of(subject):
                    share_parents(self.folder)
                    create_shared(self._path(subject))
                    with open(self._path(subject), "ab") as file:
                        file.write(f"{digest}\n".encode())

    def _path(self, subject: str) -> Path:
        return self.folder / quote(subject, safe="@")
