"""Index: which answers a log holds, and whose they are. It is made of the files alone, and read on when asked."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from adapterhub_local.data.answer_log import Head, heads, log_files
from adapterhub_local.regular import open_regular


@dataclass
class _Known:
    """What is known of one file: its answers up to `at`."""

    at: int = 0
    answers: dict[str, Head] = field(default_factory=dict)


class Index:
    """The answers in all files of a folder, those of other processes included. For one thread.

    The first look reads everything, later ones what is new. About 300 bytes of memory an answer.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, _Known] = {}

    def find(self, owner: str | None, answer_id: str) -> Head | None:
        """The answer of this id, if this key asked for it and the log still holds it."""
        self._read_on()
        for known in self._files.values():
            if (found := known.answers.get(answer_id)) is not None and found.owner == owner:
                return found
        return None

    def _read_on(self) -> None:
        files = log_files(self._folder)
        self._files = {path: self._files.get(path) or _Known() for path in files}
        for path, known in self._files.items():
            try:
                with open_regular(path) as file:
                    if os.fstat(file.fileno()).st_size > known.at:
                        file.seek(known.at)
                        known.answers |= {head.id: head for head in heads(file)}
                        known.at = file.tell()
            except OSError:  # it was removed just now, or is not a file: it holds nothing
                known.answers = {}
