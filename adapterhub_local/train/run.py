"""A training run from recipe to registered version: the main line of `qhub train`."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.load import choose_device, has_bfloat16, load_base, quiet_loading
from adapterhub_local.data.load import read_data
from adapterhub_local.durable import staging
from adapterhub_local.errors import InputError, QhubError, Stopped
from adapterhub_local.evaluate.metrics import evaluate
from adapterhub_local.plan.auto import settle
from adapterhub_local.recipe import Recipe
from adapterhub_local.registry import Registry, Version
from adapterhub_local.settings import Home, is_sharded, process
from adapterhub_local.train.adapter import factors_of, load_factors, read_factors, save, with_adapter, write_factors
from adapterhub_local.train.check import check_run
from adapterhub_local.train.curve import draw
from adapterhub_local.train.examples import Example, tokenise_data
from adapterhub_local.train.lineage import lineage_of, peak_memory_mb
from adapterhub_local.train.preflight import Preflight, preflight
from adapterhub_local.train.progress import Quiet, Reporter
from adapterhub_local.train.report import write_report
from adapterhub_local.train.runs import BEST, CURVE, LAST_GOOD, RECORD, REPORT, Run, checkpoints, differences, read_log
from adapterhub_local.train.samples import take_samples
from adapterhub_local.train.trainer import NotFinite, NotSaved, make_trainer, steps_of
from adapterhub_local.train.watch import Diverged, Watch

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def train(
    recipe: Recipe,
    home: Home,
    *,
    resume: bool = False,
    restart: bool = False,
    reporter: Reporter | None = None,
) -> Version:
    """Train the adapter a recipe describes, evaluate it beside its base, and register it as a version.

    A run that is stopped (Ctrl-C, SIGTERM) keeps its state under `runs/`; `resume` goes on from there and
    ends with the same adapter, `restart` throws that state away. Raises Stopped, and the InputErrors of
    recipe, base and data before anything is written.
    """
    assert process().is_leader, "other processes follow"
    with ExitStack() as held:

        def find_checkpoint(run: Run) -> Path | None:
            held.enter_context(run.alone())
            return run.find_checkpoint(resume=resume, restart=restart)

        return _train(recipe, home, reporter or Quiet(), find_checkpoint)


def _train(recipe: Recipe, home: Home, reporter: Reporter, find_checkpoint: Callable[[Run], Path | None]) -> Version:
    recipe, choices = settle(recipe, home)
    for choice in choices:
        reporter.note(str(choice))
    session = prepare(recipe, home, reporter, find_checkpoint)
    run, model, tests = session.run, session.model, session.tests
    fitted = fit(session, reporter)
    with keeping(run, fitted.save_state):
        model.eval()
        scores = {}
        if tests:
            with reporter.counting("evaluating the adapter") as progress:
                scores["adapter"] = evaluate(model, tests, recipe.eval.batch_size, progress)
            with model.disable_adapter(), reporter.counting("evaluating the base") as progress:
                scores["base"] = evaluate(model, tests, recipe.eval.batch_size, progress)
        samples = take_samples(model, session.tokenizer, tests, recipe.eval.samples)
        with staging(home.tmp) as folder:
            files = save(model, recipe, run.info, folder)
            statistics = fitted.statistics | session.counts
            lineage = lineage_of(run, model, scores, statistics, len(session.examples))
            if choices:
                lineage["strategy"] = [choice.to_json() for choice in choices]
            published = Registry(home).publish(recipe.output.name, files, lineage, alias=recipe.output.alias)
    entries = read_log(run.folder)
    page = write_report(str(published), lineage, entries, [sample.to_json() for sample in samples])
    try:
        (run.folder / REPORT).write_text(page, encoding="utf-8")
        (run.folder / CURVE).write_text(draw(entries, str(published)), encoding="utf-8")
        run.finish(str(published))
    except OSError as error:
        raise QhubError(f"{published} is registered, but its report cannot be written: {_told(error)}") from None
    return published


@contextmanager
def keeping(run: Run, save_state: Callable[[], None]) -> Iterator[None]:
    """What follows the last step: stopped or failed, it keeps the trained factors, and --resume goes on from there."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        asking = [number for number in STOPS[1:] if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, stop) for number in asking}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield
    except BaseException as error:
        save_state()
        by_user = isinstance(error, KeyboardInterrupt)
        reason = "stopped after the last step" if by_user else f"{type(error).__name__}: {error}"[:300]
        run.note(status="stopped" if by_user else "failed", reason=reason)
        if by_user:
            raise Stopped(
                f"stopped after the last step, before the adapter was registered; the state is kept in {run.folder}. "
                "Go on: the same command with --resume"
            ) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(error: OSError) -> str:
    """An error of the system as a person reads it."""
    return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")


def follow(recipe: Recipe, home: Home, *, resume: bool = False, restart: bool = False) -> None:
    """Take part in the run of another process (rank 0 of several), which evaluates and registers the result."""
    recipe, _ = settle(recipe, home)
    session = prepare(recipe, home, Quiet(), lambda run: run.find_checkpoint(resume=resume, restart=restart))
    fit(session, Quiet())
    if not (session.run.folder / RECORD).exists():  # a machine with a home of its own: the leader's has the run
        shutil.rmtree(session.run.folder, ignore_errors=True)


@dataclass(frozen=True)
class Session:
    """All that a run needs, loaded and checked; nothing has been written."""

    run: Run
    model: Any
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    tests: list[Example]
    counts: dict[str, Any]  # what became of examples that were too long
    checkpoint: Path | None


def prepare(recipe: Recipe, home: Home, reporter: Reporter, find_checkpoint: Callable[[Run], Path | None]) -> Session:
    """Read the data, load the base, put the adapter on it."""
    if is_sharded():
        raise InputError(
            "FSDP cannot shard this base: its 4-bit weights are stored as uint8, with which training crashes or has "
            "a loss of 0 (huggingface/accelerate#3983). Each process holds the whole base: use --nproc or torchrun"
        )
    if process().world_size > 1 and choose_device() == "cuda":
        if process().local_rank >= torch.cuda.device_count():
            raise InputError(f"--nproc asks for more GPUs than the {torch.cuda.device_count()} of this machine")
        torch.cuda.set_device(process().local_rank)
    info, start = check_run(recipe, home)
    dataset = read_data(recipe)
    for note in dataset.notes:
        reporter.note(note)
    run = Run(recipe, info, home, dataset, start)
    checkpoint = find_checkpoint(run)

    reporter.note(f"base {info.name}: loading")
    base = load_base(info, dtype=compute_dtype(recipe.train.compute))
    tokenised, held_out = tokenise_data(dataset, base.tokenizer, recipe.data)
    for part in (tokenised, held_out):
        for note in part.notes(recipe.data.max_length) if part else ():
            reporter.note(note)
    tests = held_out.examples if held_out else []
    if recipe.train.eval_every and not tests:
        raise InputError("train.eval_every: nothing is held out to evaluate on: name a file with data.test")
    model = with_adapter(base, recipe, start=start, examples=tokenised.examples)
    return Session(run, model, base.tokenizer, tokenised.examples, tests, tokenised.counts, checkpoint)


def try_out(recipe: Recipe, home: Home, reporter: Reporter) -> Preflight:
    """Everything up to the first step, and that step; leaves nothing behind."""
    recipe, _ = settle(recipe, home)
    session = prepare(recipe, home, reporter, lambda run: None)
    with quiet_loading(), staging(home.tmp) as folder:
        trainer, _ = make_trainer(session.model, session.examples, recipe.train, folder, lambda entry: None)
        return preflight(trainer, session.examples, home)


@dataclass(frozen=True)
class Fitted:
    """Steps, tokens, seconds and the last loss of a run; and how to keep its state, from which it can be resumed."""

    statistics: dict[str, Any]
    save_state: Callable[[], None]


def fit(session: Session, reporter: Reporter) -> Fitted:
    """Run the optimizer over the examples. Raises Stopped, and QhubError for a run gone wrong."""
    run, model, examples, train = session.run, session.model, session.examples, session.run.recipe.train
    tokens_a_step = sum(len(example.ids) for example in examples) / len(examples) * train.batch_size
    steps = steps_of(len(examples), train)
    with quiet_loading(), reporter.training(steps, tokens_a_step) as report:
        watch = Watch(
            lambda entry: None,
            evaluate=lambda: held_out(model, session.tests, run.recipe.eval.batch_size),
            eval_every=train.eval_every,
            patience=train.patience,
            save_every=train.save_every,
            keep_best=(lambda: write_factors(model, run.folder / BEST)) if run.leader else None,
            factors=factors_of(model),
        )
        trainer, _ = make_trainer(model, examples, train, run.folder, watch.report, watch)
        try:
            agree(run)
            preflight(trainer, examples, run.home)
        except BaseException:
            with suppress(OSError):  # the Trainer has made an empty folder
                run.folder.rmdir()
            raise
        entries = run.begin(session.checkpoint, steps)
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
                        report(int(entry["step"]), entry["loss"])

                watch.report = note
                if not watch.stopped_early:  # else it was resumed after its end
                    trainer.train(resume_from_checkpoint=str(session.checkpoint) if session.checkpoint else None)
        except (NotFinite, Diverged) as error:
            run.note(status="failed", reason=str(error))
            raise QhubError(f"{error}: {_keep_good(session, watch)}") from None
        except BaseException as error:
            with suppress(OSError):  # of a full disk
                run.note(status="failed", reason=f"{type(error).__name__}: {error}"[:300])
            found = checkpoints(run.folder)
            hint = f"; --resume goes on from {found[-1].name}" if found else ""
            if isinstance(error, NotSaved):
                raise NotSaved(f"{error}{hint}") from None
            if isinstance(error, OSError):
                raise QhubError(f"the run cannot go on: {_told(error)}{hint}") from None
            raise
        seconds = time.perf_counter() - start
    step = int(log[-1]["step"]) if watch.stopped_early else trainer.state.global_step
    if step < steps and not watch.stopped_early:
        run.note(status="stopped", reason=f"stopped at step {step}")
        raise Stopped(
            f"stopped at step {step} of {steps}; the state is kept in {run.folder}. "
            "Go on: the same command with --resume. Begin anew: with --restart"
        )
    if torch.distributed.is_initialized():
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
            trainer._save_checkpoint(model, None)

    return Fitted(statistics, save_state)


def agree(run: Run) -> None:
    """Hold what decides the run against that of the other processes, which may be on other machines.

    Raises InputError in all of them, with what differs from the first.
    """
    if not torch.distributed.is_initialized():
        return
    told: list[Any] = [None] * process().world_size
    torch.distributed.all_gather_object(told, run.decisive)
    for rank, other in enumerate(told):
        if other != told[0]:
            changes = ", ".join(differences(told[0], other))
            raise InputError(f"process {rank} does not train the same: {changes}; give every machine the same files")


def held_out(model: Any, tests: list[Example], batch_size: int) -> dict[str, float]:
    """The scores of the model as it is, for the log. Draws no random number, so it changes nothing."""
    model.eval()
    score = evaluate(model, tests, batch_size)
    return {"eval_loss": score.loss, "eval_exact_match": score.exact_match}


def _keep_good(session: Session, watch: Watch) -> str:
    """Write the last good factors as an adapter; returns what to tell the user."""
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


def compute_dtype(wanted: str) -> torch.dtype:
    """The dtype of activations: `auto` is bfloat16 where the hardware has matrix units for it.

    Not float16 on older GPUs: gradients need its range scaled, and a base of bfloat16 weights can overflow it.
    """
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    fast = has_bfloat16() if choose_device() == "cuda" else torch.cpu.get_capabilities().get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def stopping(watch: Watch) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal ask the trainer to stop after the step; a second one stops at once."""

    def ask(number: int, frame: Any) -> None:
        if watch.stop_asked and process().world_size == 1:  # several would wait for the one that is gone
            raise KeyboardInterrupt
        watch.stop_asked = True

    try:
        asking = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has it
        before = {number: signal.signal(number, ask) for number in asking}
    except ValueError:  # not the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
