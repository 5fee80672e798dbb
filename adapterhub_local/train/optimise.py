"""The optimizer over the examples: stopped, resumed, watched, and the last good adapter kept when it goes wrong."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.base.load import quiet_loading
from adapterhub_local.base.model import as_module
from adapterhub_local.errors import InputError, QhubError, Stopped
from adapterhub_local.progress import Reporter
from adapterhub_local.recipe.derived import num_steps
from adapterhub_local.rows.example import num_tokens
from adapterhub_local.settings import process
from adapterhub_local.signals import handling
from adapterhub_local.train.adapter import factors_of, load_factors, read_factors, save, write_factors
from adapterhub_local.train.lineage import peak_memory_mb
from adapterhub_local.train.objectives.objective import Objective
from adapterhub_local.train.past_runs import BEST, LAST_GOOD, checkpoints, is_asked_to_stop, step_of
from adapterhub_local.train.preflight import preflight
from adapterhub_local.train.run_folder import Run, differences
from adapterhub_local.train.session import Session
from adapterhub_local.train.shards import shards_of
from adapterhub_local.train.trainer import NotFinite, NotSaved, make_trainer
from adapterhub_local.train.watch import Diverged, Watch

# several processes on a CPU have their state read to the device cpu:0, which torch 2.11 does not know
torch.serialization.register_package(
    0, lambda _: None, lambda storage, place: storage if place.startswith("cpu:") else None
)
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Fitted:
    """Steps, tokens, seconds and the last loss of a run; and how to keep its state, from which it can be resumed."""

    statistics: dict[str, Any]
    save_state: Callable[[], None]
    objective: Objective


def fit(session: Session, checkpoint: Path | None, reporter: Reporter) -> Fitted:
    """Run the optimizer over the examples, from a checkpoint on. Raises Stopped, and QhubError for a run gone wrong."""
    run, model, examples, recipe = session.run, session.model, session.examples, session.run.recipe
    train = recipe.train
    tokens_a_step = sum(map(num_tokens, examples)) / len(examples) * train.batch_size
    steps = num_steps(len(examples), train)
    with quiet_loading(), reporter.training(steps, tokens_a_step) as report:
        watch = Watch(
            lambda entry: None,
            evaluate=lambda: trainer.objective.held_out(session.tests, recipe.eval.batch_size),
            eval_every=train.eval_every,
            patience=train.patience,
            save_every=train.save_every,
            keep_best=(lambda: write_factors(model, run.folder / BEST)) if run.leader else None,
            factors=factors_of(model),
            is_asked_to_stop=lambda: is_asked_to_stop(run.folder),
        )
        trainer = make_trainer(model, examples, recipe, run.folder, watch, session.tokenizer, run.info)
        for line in trainer.objective.notes:
            reporter.note(line)
        try:
            agree(run)
            preflight(trainer, examples, run.home)
        except BaseException:
            with suppress(OSError):  # the Trainer has made an empty folder
                run.folder.rmdir()
            raise
        entries = run.begin(checkpoint, steps)
        # resumed after its last step: the Trainer would take one more within an epoch
        is_done = checkpoint is not None and step_of(checkpoint) >= steps
        watch.restore(entries)
        log = [entry for entry in entries if "loss" in entry]
        start = time.perf_counter() - (log[-1].get("seconds", 0.0) if log else 0.0)
        try:
            with run.logging() as write, stopping(watch):

                def note(entry: dict[str, Any]) -> None:
                    entry["seconds"] = round(time.perf_counter() - start, 3)
                    write(entry)
                    if "loss" in entry:
                        log.append(entry)
                        report(int(entry["step"]), entry["loss"], _shown(entry))

                watch.report = note
                if is_done:
                    trainer._load_from_checkpoint(str(checkpoint))
                elif not watch.stopped_early:
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (NotFinite, Diverged) as error:
            run.note(status="failed", reason=str(error))
            raise QhubError(f"{error}: {_keep_good(session, watch)}") from None
        except BaseException as error:
            with suppress(OSError):  # of a full disk
                run.note(status="failed", reason=f"{type(error).__name__}: {error}"[:300])
            found = checkpoints(run.folder)
            hint = f"; --resume continues from {found[-1].name}" if found else ""
            if isinstance(error, NotSaved):
                raise NotSaved(f"{error}{hint}") from None
            if isinstance(error, OSError):
                raise QhubError(f"the run cannot continue: {reason_of(error)}{hint}") from None
            raise
        seconds = time.perf_counter() - start
    step = int(log[-1]["step"]) if watch.stopped_early or is_done else trainer.state.global_step
    if step < steps and not watch.stopped_early:
        run.note(status="stopped", reason=f"stopped at step {step}")
        raise Stopped(
            f"stopped at step {step} of {steps}; the state is kept in {run.folder}. "
            "To continue, run the same command with --resume; to start over, with --restart"
        )
    if torch.distributed.is_initialized() and shards_of(model) is None:  # else the base is still needed together
        torch.distributed.destroy_process_group()
    if watch.best and watch.best[1] < step and run.leader:
        load_factors(model, read_factors(run.folder / BEST))
    statistics = {
        "steps": step,
        "tokens_per_second": round(len(log) * tokens_a_step / seconds, 1),
        "seconds": round(seconds, 1),
        "loss": log[-1]["loss"] if log else None,
        "peak_memory_mb": peak_memory_mb(),
        **({"processes": trainer.args.world_size} if trainer.args.world_size > 1 else {}),
        **({"best_step": watch.best[1], "stopped_early": watch.stopped_early} if watch.best else {}),
    }

    def save_state() -> None:
        if trainer.args.world_size == 1 and checkpoints(run.folder)[-1:] != [run.folder / f"checkpoint-{step}"]:
            trainer._save_checkpoint(as_module(model), None)

    return Fitted(statistics, save_state, trainer.objective)


def agree(run: Run) -> None:
    """Hold what decides the run against that of the other processes, which may be on other machines.

    Raises InputError in all of them, with what differs from the first.
    """
    if not torch.distributed.is_initialized():
        return
    decisive: list[Any] = [None] * process().world_size
    torch.distributed.all_gather_object(decisive, run.decisive)
    for rank, other in enumerate(decisive):
        if other != decisive[0]:
            changes = ", ".join(differences(decisive[0], other))
            raise InputError(f"process {rank} does not train the same: {changes}; give every machine the same files")


def _keep_good(session: Session, watch: Watch) -> str:
    """Write the last good factors as an adapter; returns a sentence for the user."""
    advice = "lower train.learning_rate, or look at the data"
    if not session.run.leader:
        return advice
    if watch.good is not None:
        load_factors(session.model, watch.good.items())
    elif not all(bool(torch.isfinite(factor).all()) for factor in factors_of(session.model).values()):
        return advice
    folder = session.run.folder / LAST_GOOD
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save(session.model, session.run.recipe, session.run.info, folder)
    return f"{advice}. The last good adapter is kept in {folder} (`qhub add` registers it)"


def _shown(entry: Mapping[str, Any]) -> str:
    """What a step of the log reports beside its loss, for the line of progress."""
    names = {"reward_accuracy": "accuracy", "reward_margin": "margin", "reward": "reward"}
    return "".join(f", {shown} {entry[name]:.2f}" for name, shown in names.items() if name in entry)


@contextmanager
def stopping(watch: Watch) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal ask the trainer to stop after the step; a second one stops at once."""

    def ask(number: int, frame: Any) -> None:
        if watch.stop_asked and process().world_size == 1:  # several would wait for the one that is gone
            raise KeyboardInterrupt
        watch.stop_asked = True

    with handling(STOPS, ask):
        yield


def reason_of(error: OSError) -> str:
    """An error of the system as a person reads it."""
    return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
