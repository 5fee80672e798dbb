"""A run while it is running: what decides its result, its lock, and what it writes to its folder under `runs/`.

The folder is named after all that decides the result (recipe, data digests, base fingerprint), so only the very
same run continues. Loads no torch.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.data.dataset import Dataset
from adapterhub_local.durable import canonical_json, digest_bytes, replacing
from adapterhub_local.errors import InUse, NotFound
from adapterhub_local.recipe import Recipe
from adapterhub_local.registry import Version
from adapterhub_local.registry.rows import now
from adapterhub_local.settings import Home, process, restarts
from adapterhub_local.train.past_runs import (
    BEST,
    LOG,
    RECORD,
    STOP,
    checkpoints,
    holding,
    list_runs,
    read_log,
    read_record,
    step_of,
)


class Run:
    """The folder of the run that a recipe, its data and its base decide."""

    def __init__(
        self, recipe: Recipe, info: BaseInfo, home: Home, dataset: Dataset, start: Version | None = None
    ) -> None:
        self.recipe, self.info, self.home, self.start = recipe, info, home, start
        self.data, self.test_digest = dataset.records, dataset.test_digest
        self.decisive: dict[str, Any] = {"recipe": recipe.to_json(), "data": self.data, "base": info.fingerprint}
        if start is not None:  # an alias may point elsewhere tomorrow
            self.decisive["from"] = start.content_digest
        identity = digest_bytes(canonical_json(self.decisive)).removeprefix("sha256:")[:12]
        self.folder = home.runs / f"{recipe.output.name.replace('/', '.')}-{identity}"
        self.notes: list[str] = []  # remarks on data and choices from before it began
        self.leader = process().is_leader  # among several processes the one that writes

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While the block lasts no other process can train this very run. Raises InUse if one does.

        The system itself gives the lock back when a process ends, however it ends.
        """
        try:
            with ExitStack() as stack:
                try:
                    stack.enter_context(holding(self.folder))
                except BlockingIOError:
                    raise InUse(
                        f"{self.folder.name} is being trained by another process: `qhub runs show {self.folder.name}` "
                        "shows how far it is; stop it first to train it here"
                    ) from None
                yield
        finally:
            with suppress(OSError):  # it holds other runs
                self.folder.parent.rmdir()

    def find_checkpoint(self, *, resume: bool, restart: bool) -> Path | None:
        """The state to continue from, if that is asked for.

        torchrun starts a run and starts it again by one command: under it `resume` begins what has no state yet.
        Raises NotFound with what has changed since a run of this name was stopped, or InUse if the user must choose.
        """
        found = checkpoints(self.folder)
        if resume and not found and restarts() is None:
            raise NotFound(
                f"no stopped run has this recipe, data and base{self._changed()}: leave out --resume to begin one"
            )
        if found and not resume and not restart:
            raise InUse(
                f"a run of this recipe has its state of step {step_of(found[-1])} kept: add --resume to continue "
                "or --restart to start over"
            )
        if restart and self.leader:
            shutil.rmtree(self.folder, ignore_errors=True)
        return found[-1] if resume and found else None

    def registered(self) -> str | None:
        """The version that this very run has made, where torchrun starts it again although it was finished."""
        record = read_record(self.folder) if restarts() else {}
        return record.get("version") if record.get("status") == "finished" else None

    def _changed(self) -> str:
        for other in reversed(list_runs(self.home)):
            before = other.record.get("decisive")
            if before and other.record["name"] == self.recipe.output.name and checkpoints(other.folder):
                changes = ", ".join(differences(before, self.decisive)) or "the keys of recipes changed"
                return (
                    f" ({other.id} was stopped at step {step_of(checkpoints(other.folder)[-1])}; since then {changes})"
                )
        return ""

    def begin(self, checkpoint: Path | None, steps: int) -> list[dict[str, Any]]:
        """Note that the run continues; returns the lines its log has up to the checkpoint, and drops those after it."""
        kept = []
        if checkpoint is not None:
            kept = [entry for entry in read_log(self.folder) if entry["step"] <= step_of(checkpoint)]
        if self.leader:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / STOP).unlink(missing_ok=True)  # it was asked of the run as it went on before
            with replacing(self.folder / LOG) as staged:  # other processes may be reading it
                staged.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
            self.note(
                status="running", started_at=now(), pid=os.getpid(), steps=steps, reason=None, version=None,
                name=self.recipe.output.name, decisive=self.decisive, base=self.info.name, text=self.recipe.text,
                overrides=list(self.recipe.overrides), path=str(self.recipe.path.absolute()), notes=self.notes,
            )  # fmt: skip
        return kept

    @contextmanager
    def logging(self) -> Iterator[Callable[[Mapping[str, float]], None]]:
        """A function that appends one line to the run's log."""
        if not self.leader:
            yield lambda entry: None
            return
        with open(self.folder / LOG, "a", encoding="utf-8") as file:

            def write(entry: Mapping[str, float]) -> None:
                file.write(json.dumps(entry) + "\n")
                file.flush()

            yield write

    def note(self, **changes: Any) -> None:
        """Change entries of the run's record; a reader sees the old one or the new one."""
        if not self.leader or not self.folder.is_dir():
            return
        record = {**read_record(self.folder), **changes}
        with replacing(self.folder / RECORD) as staged:
            staged.write_bytes(canonical_json(record))

    def finish(self, version: str, eval_loss: float | None = None) -> None:
        """Note the registered version, with its held-out loss, and drop the checkpoints; log and report stay."""
        self.note(status="finished", version=version, finished_at=now(), eval_loss=eval_loss)
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        (self.folder / BEST).unlink(missing_ok=True)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """What decides a run and is not the same, in words."""
    if before.get("from") != after.get("from"):
        yield "adapter.from is another version"
    if before["base"] != after["base"]:
        yield f"the base changed from {before['base'][:19]} to {after['base'][:19]}"
    known = {(entry["role"], entry["file"]): entry for entry in before["data"]}
    for entry in after["data"]:
        old = known.get((entry["role"], entry["file"]))
        if old is None or old["digest"] != entry["digest"]:
            yield f"data.{entry['role']} ({entry['file']}) changed"
    for table, values in after["recipe"].items():
        for key, value in values.items():
            old = before["recipe"].get(table, {}).get(key)
            if json.dumps(old) != json.dumps(value):
                yield f"{table}.{key} changed from {old} to {value}"
