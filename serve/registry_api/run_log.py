"""Logs of runs, followed: what was read is not read again, neither by programs nor by pages that ask each second.

A log grows by whole lines. A run that is resumed, or begins again, has another file under its name.
"""

import json
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterhub_local.train.past_runs import LOG, Newest

MAX_POINTS = 300  # of a curve; up to twice as many while it grows
TIMED = 20  # of the last lines, from which the time left is estimated
KEPT, KEPT_CURVES = 4096, 16  # runs whose last figures, and whose curves, are kept
CHUNK = 1 << 20
_MARK = 64  # bytes before the place where we stopped: they are there as long as it is the file that we read


def log_from(folder: Path, offset: int, limit: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from byte `offset` on, `limit` bytes of them at most, and where the next begins.

    A log that is shorter than `offset` was begun again: it is read from its start.
    """
    try:
        with open(folder / LOG, "rb") as log:
            if os.fstat(log.fileno()).st_size < offset:
                offset = 0
            log.seek(offset)
            data = log.read(limit)
    except FileNotFoundError:
        return [], 0
    whole = data[: data.rfind(b"\n") + 1]
    return list(_entries(whole)), offset + len(whole)


def _entries(lines: bytes) -> Iterator[dict[str, Any]]:
    for line in lines.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry:
            yield entry


class Thinned:
    """A curve of a few hundred points, however many it is given: each second one is dropped when they are too many."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, float]] = []
        self._last: tuple[float, float] | None = None
        self._every, self._count = 1, 0

    def add(self, x: Any, y: Any) -> None:
        """The next point, if both are numbers."""
        if not isinstance(x, int | float) or not isinstance(y, int | float):
            return
        self._last = (x, float(y))
        if self._count % self._every == 0:
            self._kept.append(self._last)
            if len(self._kept) > 2 * MAX_POINTS:
                self._kept, self._every = self._kept[::2], 2 * self._every
        self._count += 1

    def points(self) -> list[tuple[float, float]]:
        """What is drawn; the last point is always among it."""
        return [*self._kept, *([self._last] if self._last is not None and self._kept[-1] is not self._last else [])]


class Followed:
    """What pages show of one log, as far as it was read."""

    def __init__(self, path: Path, *, with_curves: bool) -> None:
        self._path, self._with_curves = path, with_curves
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self.newest = Newest()
        self.curves = {key: Thinned() for key in ("loss", "eval_loss", "learning_rate")}
        self.timed: deque[dict[str, Any]] = deque(maxlen=TIMED)
        self._file: tuple[int, int] | None = None
        self._place, self._mark = 0, b""

    def read_on(self) -> "Followed":
        """Read what was added since; all of it if the file is another."""
        with self._lock:
            try:
                with open(self._path, "rb") as log:
                    status = os.fstat(log.fileno())
                    file = (status.st_dev, status.st_ino)
                    if file != self._file or status.st_size < self._place or not self._is_ours(log):
                        self._begin()
                        self._file = file
                    if status.st_size > self._place:
                        self._take(log)
            except FileNotFoundError:
                self._begin()
        return self

    def _is_ours(self, log: Any) -> bool:
        """The number of a removed file is given to the next one; what it says is not."""
        log.seek(self._place - len(self._mark))
        return bool(log.read(len(self._mark)) == self._mark)

    def _take(self, log: Any) -> None:
        log.seek(self._place)
        rest = b""
        while chunk := log.read(CHUNK):
            data = rest + chunk
            end = data.rfind(b"\n") + 1
            whole, rest = data[:end], data[end:]
            self._place += len(whole)
            self._mark = (self._mark + whole)[-_MARK:]
            if self._with_curves:
                for entry in _entries(whole):
                    self._look(entry)
            else:
                self._look_at_last(whole)

    def _look_at_last(self, lines: bytes) -> None:
        """Only the last line with each figure is parsed: a list of many runs is read for the first time, too."""
        for key in ("loss", "eval_loss"):
            end = len(lines)
            while (found := lines.rfind(f'"{key}"'.encode(), 0, end)) >= 0:
                end = lines.rfind(b"\n", 0, found) + 1
                entry = next(_entries(lines[end : lines.find(b"\n", found)]), {})
                if key in entry:
                    self.newest.take({"step": entry["step"], key: entry[key]})
                    break

    def _look(self, entry: dict[str, Any]) -> None:
        self.newest.take(entry)
        for key, curve in self.curves.items():
            if key in entry:
                curve.add(entry["step"], entry[key])
        if "loss" in entry and isinstance(entry.get("seconds"), int | float):
            self.timed.append(entry)


class RunLogs:
    """The logs that pages asked for lately."""

    def __init__(self) -> None:
        self._figures: OrderedDict[Path, Followed] = OrderedDict()
        self._curves: OrderedDict[Path, Followed] = OrderedDict()
        self._lock = threading.Lock()

    def newest(self, folder: Path) -> Newest:
        """The last figures of a run."""
        return self._followed(self._figures, KEPT, folder, with_curves=False).newest

    def curves(self, folder: Path) -> Followed:
        """The last figures and the curves of a run."""
        return self._followed(self._curves, KEPT_CURVES, folder, with_curves=True)

    def _followed(self, kept: OrderedDict[Path, Followed], bound: int, folder: Path, *, with_curves: bool) -> Followed:
        with self._lock:
            log = kept.pop(folder, None) or Followed(folder / LOG, with_curves=with_curves)
            kept[folder] = log
            while len(kept) > bound:
                kept.popitem(last=False)
        return log.read_on()
