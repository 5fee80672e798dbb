"""Jobs: what takes long runs as `qhub` itself, in a process of its own with low priority, and leaves its JSON here.

The server's process stays small and quick, and what a page starts is what a person could have typed.
"""

import json
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub_local.actor import current_actor
from adapterhub_local.errors import InUse, NotFound
from adapterhub_local.settings import Home, environment_in
from serve.errors import Busy

MAX_RUNNING = 2
MAX_KEPT = 64
MAX_OUTPUT = 32 << 20  # bytes


@dataclass
class Job:
    """A command of `qhub` that runs, or has run.

    `result` is the JSON that it printed, `error` its message when it failed, `about` the adapters that it is about.
    """

    id: str
    kind: str
    command: tuple[str, ...]
    about: tuple[str, ...] = ()
    state: str = "running"  # running, done, failed, cancelled
    cancel_asked: bool = False  # asked for; it may still end by itself
    started: float = 0.0
    seconds: float | None = None
    result: Any = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "kind": self.kind,
            "command": ["qhub", *self.command],
            "state": self.state,
            "cancel_asked": self.cancel_asked,
            "seconds": round(self.seconds if self.seconds is not None else time.time() - self.started, 1),
            "result": self.result,
            "error": self.error,
        }


class Jobs:
    """The jobs of one server, the newest of them kept."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._jobs: dict[str, Job] = {}
        self._known: dict[tuple[str, ...], str] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def start(
        self, kind: str, command: Sequence[str], about: Sequence[str], *, same: Sequence[str] | None = None
    ) -> Job:
        """Run `qhub` with these words. With `same`, a job that had the same and did not fail is given again.

        Raises Busy while as many run as may.
        """
        with self._lock:
            known = self._jobs.get(self._known.get(tuple(same), "")) if same else None
            if known is not None and known.state in ("running", "done") and not known.cancel_asked:
                return known
            if len(self._processes) >= MAX_RUNNING:
                raise Busy(f"{MAX_RUNNING} jobs are running already: try again when one of them is done")
            job = Job(secrets.token_hex(8), kind, tuple(command), tuple(about), started=time.time())
            nice = ["nice", "-n", "19"] if shutil.which("nice") else []
            process = subprocess.Popen(
                [*nice, sys.executable, "-m", "adapterhub_local", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment_in(self.home, current_actor()),
                start_new_session=True,
            )
            self._jobs[job.id], self._processes[job.id] = job, process
            if same:
                self._known[tuple(same)] = job.id
            for old in [one for one in self._jobs.values() if one.state != "running"][:-MAX_KEPT]:
                del self._jobs[old.id]
        threading.Thread(target=self._wait, args=(job, process), name=f"job-{kind}", daemon=True).start()
        return job

    def find(self, identity: str) -> Job:
        """The job of this id. Raises NotFound."""
        job = self._jobs.get(identity)
        if job is None:
            raise NotFound("there is no such job: the server keeps those it started, until it ends")
        return job

    def all(self) -> list[Job]:
        """Every job that is kept, the newest first."""
        return sorted(self._jobs.values(), key=lambda job: job.started, reverse=True)

    def cancel(self, identity: str) -> Job:
        """Ask a job to end: a run stops after its step and is kept, or at once when asked again; others end at once.

        Raises NotFound, InUse if it has ended.
        """
        job = self.find(identity)
        with self._lock:
            process = self._processes.get(job.id)
            if process is None:
                raise InUse(f"this job is {job.state} already: there is nothing to cancel")
            job.cancel_asked = True
            process.terminate()
        return job

    def close(self) -> None:
        """End what still runs."""
        for process in list(self._processes.values()):
            process.terminate()

    def _wait(self, job: Job, process: "subprocess.Popen[bytes]") -> None:
        out, err = process.communicate()
        result, error = None, None
        # a plan that does not fit ends with 1, and says so
        if process.returncode == 0 or (job.kind == "plan" and process.returncode == 1 and out.strip()):
            try:
                result = json.loads(out) if len(out) <= MAX_OUTPUT else None
            except ValueError:
                error = "its output cannot be read"
        elif job.cancel_asked:
            error = "it was cancelled"
        else:
            lines = [line for line in err.decode(errors="replace").splitlines() if line.startswith("qhub: ")]
            error = "; ".join(line.removeprefix("qhub: ") for line in lines) or f"it ended with {process.returncode}"
        with self._lock:
            self._processes.pop(job.id, None)
            job.seconds, job.result, job.error = time.time() - job.started, result, error
            failed = "cancelled" if job.cancel_asked else "failed"
            job.state = failed if error else "done"
