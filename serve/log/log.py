"""RequestLog: answers and feedback are written by a thread of its own, so that no token ever waits for a disk."""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from adapterhub_local.data.answer_log import ANSWER, FEEDBACK, line, now
from adapterhub_local.errors import NotFound, QhubError
from serve.errors import BadParameter
from serve.log.files import LogFiles
from serve.log.index import Index

logger = logging.getLogger(__name__)
MAX_WAITING = 1 << 22  # tokens of answers that wait to be written: more are lost, and counted
NO_LOG = "this server keeps no request log, so there is no answer to rate: start it with `qhub serve --request-log DIR`"
Note = Callable[[str, bool], None]  # a record of this kind was written, or lost


class RequestLog:
    """The log in `folder`, of `size` bytes at most. `logs_all`: answers are logged whether they ask for it or not.

    A record that cannot be written is lost: that is counted, and warned of once until one is written again. Raises
    InputError if the folder cannot be used.
    """

    def __init__(self, folder: Path, size: int, *, logs_all: bool = False, note: Note = lambda kind, ok: None) -> None:
        self.folder = folder
        self.logs_all = logs_all
        self._note = note
        self._files = LogFiles(folder, size)
        self._index = Index(folder)
        self._thread = ThreadPoolExecutor(1, "request-log")
        self._lock = threading.Lock()
        self._waiting = 0
        self._is_failing = False

    def append(self, num_tokens: int, record: Callable[[], Mapping[str, Any]]) -> None:
        """Have an answer of this many tokens written soon; what `record` does is done in the log's thread.

        Never waits and never raises: an answer does not fail because it could not be logged.
        """
        with self._lock:
            has_room = not self._waiting or self._waiting + num_tokens <= MAX_WAITING
            self._waiting += num_tokens if has_room else 0
        try:
            if not has_room:
                raise RuntimeError("more answers come than can be written")
            self._thread.submit(self._append, num_tokens, record)
        except RuntimeError as error:
            self._lose(ANSWER, error)

    async def rate(self, owner: str | None, feedback: Mapping[str, Any]) -> None:
        """Write feedback on an answer, once it is on disk: `feedback` has its `id` and `choice`.

        Raises NotFound unless a logged answer of this key has the id, BadParameter about the choice, TooLarge, and
        QhubError if it could not be written.
        """
        await asyncio.wrap_future(self._thread.submit(self._rate, owner, feedback))

    def close(self) -> None:
        """Write what waits, and no more."""
        self._thread.shutdown()
        self._files.close()

    def _append(self, num_tokens: int, record: Callable[[], Mapping[str, Any]]) -> None:
        try:
            self._write(line(record()))
            self._note(ANSWER, True)
        except Exception as error:  # the next record is written all the same
            self._lose(ANSWER, error)
        finally:
            with self._lock:
                self._waiting -= num_tokens

    def _rate(self, owner: str | None, feedback: Mapping[str, Any]) -> None:
        found = self._index.find(owner, feedback["id"])
        if found is None:
            why = "" if self.logs_all else ": ask for it with store = true"
            raise NotFound(f"no answer '{feedback['id'][:80]}' of this key is in the request log{why}")
        choice = feedback["choice"]
        if choice is None and found.num_choices > 1:
            raise BadParameter(f"this answer has {found.num_choices} choices: write which of them, from 0", "choice")
        if (choice or 0) >= found.num_choices:
            raise BadParameter(f"this answer has no choice {choice}: the last is {found.num_choices - 1}", "choice")
        record = {"kind": FEEDBACK, "id": found.id, "key": owner, "choice": choice or 0, "time": now()}
        try:
            self._write(line({**record, **{name: value for name, value in feedback.items() if name not in record}}))
        except OSError as error:
            self._lose(FEEDBACK, error)
            reason = error.strerror or error
            raise QhubError(f"the feedback could not be written ({reason}): try again later") from None
        self._note(FEEDBACK, True)

    def _write(self, row: bytes) -> None:
        self._files.append(row)
        self._is_failing = False

    def _lose(self, kind: str, error: Exception) -> None:
        self._note(kind, False)
        if not self._is_failing:
            self._is_failing = True
            reason = getattr(error, "strerror", None) or error
            logger.warning("the request log %s loses records: %s", self.folder, reason)
