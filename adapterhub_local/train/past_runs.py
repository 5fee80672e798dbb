"""The runs under `runs/` as their folders show them: which are running, how they went, which may be resumed.

A folder holds `run.json`, `log.jsonl` (a line a step), checkpoints and the report. Loads no torch.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from adapterhub_local.errors import InUse, NotFound
from adapterhub_local.settings import Home, make_folder

RECORD, LOG, REPORT, CURVE, BEST, LAST_GOOD, STOP = (
    "run.json", "log.jsonl", "report.html", "curve.svg", "best.safetensors", "last-good", "stop",
)  # fmt: skip
STATE = "trainer_state.json"  # the Trainer writes it last: a checkpoint without it is not whole


@dataclass
class Newest:
    """The last figures of a log."""

    step: int = 0
    loss: Any = None
    eval_loss: Any = None
    is_evaluated: bool = False

    def take(self, entry: Mapping[str, Any]) -> None:
        """Read the next line of the log."""
        if "loss" in entry:
            self.step, self.loss = entry["step"], entry["loss"]
        if "eval_loss" in entry:
            self.eval_loss, self.is_evaluated = entry["eval_loss"], True

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, Any]]) -> "Newest":
        """Those of a whole log."""
        found = cls()
        for entry in entries:
            found.take(entry)
        return found


@dataclass(frozen=True)
class PastRun:
    """A run as its folder shows it."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def status(self) -> str:
        """running, finished, stopped, failed, or crashed: recorded as running by a process that is gone."""
        status = self.record.get("status", "crashed")
        return "crashed" if status == "running" and not is_held(self.folder) else status

    @property
    def can_resume(self) -> bool:
        return self.status in ("stopped", "failed", "crashed") and bool(checkpoints(self.folder))

    def has_started_since(self, moment: float) -> bool:
        """Whether it was begun, or gone on with, at or after this time (seconds since 1970)."""
        try:
            return datetime.fromisoformat(self.record["started_at"]).timestamp() >= moment
        except (KeyError, TypeError, ValueError):
            return False

    def to_json(self, newest: Newest | None = None) -> dict[str, Any]:
        """The run as lists show it; who follows its log says what is `newest` there."""
        newest = newest or Newest.of(read_log(self.folder))
        report = self.folder / REPORT
        return {
            "id": self.id,
            "name": self.record.get("name"),
            "base": self.record.get("base"),
            "status": self.status,
            "can_resume": self.can_resume,
            "step": newest.step,
            "steps": self.record.get("steps"),
            "loss": newest.loss,
            "eval_loss": newest.eval_loss if newest.is_evaluated else self.record.get("eval_loss"),
            "version": self.record.get("version"),
            "reason": self.record.get("reason"),
            "started_at": self.record.get("started_at"),
            "report": str(report) if report.is_file() else None,
            "folder": str(self.folder),
        }


def is_held(folder: Path) -> bool:
    """Whether a process trains the run in `folder`: its lock decides, since its process number may be another's."""
    try:
        with open(lock_of(folder), encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """While the block lasts no other process trains or removes the run in `folder`. Raises BlockingIOError if one does.

    The system itself gives the lock back when a process ends, however it ends.
    """
    path = lock_of(folder)
    for patience in (*[0.01] * 10, None):  # `is_held` has it for a moment
        try:
            lock = _locked(path)
            break
        except BlockingIOError:
            if patience is None:
                raise
            time.sleep(patience)
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> TextIO:
    """The file that has this name, locked; whoever had the lock before has removed its file."""
    while True:
        make_folder(path.parent)
        try:
            lock = open(path, "a", encoding="utf-8")  # noqa: SIM115 - it is returned
        except FileNotFoundError:  # the run that ended last removed the folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            lock.close()
            raise
        lock.close()


def list_runs(home: Home) -> list[PastRun]:
    """All runs, the oldest first."""
    folders = [record.parent for record in home.runs.glob(f"*/{RECORD}")]
    runs = [PastRun(folder, read_record(folder)) for folder in folders]
    return sorted(runs, key=lambda run: (run.record.get("started_at") or "", run.id))


def run_at(home: Home, identity: str) -> PastRun | None:
    """The run with this whole id, without a look at the others."""
    folder = home.runs / identity
    if folder.name != identity or identity == ".." or not os.path.isfile(folder / RECORD):  # False for any text
        return None
    return PastRun(folder, read_record(folder))


def find_run(home: Home, wanted: str) -> PastRun:
    """The run with this id, or the newest whose id or adapter name begins with it. Raises NotFound."""
    runs = list_runs(home)
    for run in runs:
        if run.id == wanted:
            return run
    found = [run for run in runs if wanted and (run.id.startswith(wanted) or run.record.get("name") == wanted)]
    if not found:
        raise NotFound(f"there is no run '{wanted}': `qhub runs list` shows them")
    return found[-1]


def ask_to_stop(run: PastRun) -> None:
    """Ask a run to stop after its step, whichever process trains it: its number may be another's by now."""
    (run.folder / STOP).touch()


def is_asked_to_stop(folder: Path) -> bool:
    """Whether somebody asked the run in `folder` to stop."""
    return (folder / STOP).exists()


def remove_run(run: PastRun) -> None:
    """Remove a run's folder; the version it made stays. Raises InUse while it is running."""
    try:
        with holding(run.folder):
            shutil.rmtree(run.folder)
    except BlockingIOError:
        raise InUse(f"{run.id} is running (process {run.record.get('pid')}): stop it first") from None


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that a crash cut off is left out."""
    entries = []
    if (folder / LOG).is_file():
        for line in (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return [entry for entry in entries if isinstance(entry, dict) and "step" in entry]


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / STATE).is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def read_record(folder: Path) -> dict[str, Any]:
    """What a run's folder says of it; {} if nothing can be read."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
