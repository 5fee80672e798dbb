"""A training run from recipe to registered version: the main line of `qhub train`."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.base.load import quiet_loading
from adapterhub_local.durable import staging
from adapterhub_local.errors import Protected, QhubError, Stopped
from adapterhub_local.evaluate.evaluate import checked
from adapterhub_local.evaluate.metrics import Score
from adapterhub_local.evaluate.preferences import AnyScore, score_items
from adapterhub_local.plan.auto import Choice, settle
from adapterhub_local.progress import Counting, Keeping, Quiet, Reporter
from adapterhub_local.recipe import Recipe
from adapterhub_local.registry import Registry, Version
from adapterhub_local.settings import Home, process
from adapterhub_local.signals import handling
from adapterhub_local.train.adapter import factors_of, save
from adapterhub_local.train.launch import missing_others
from adapterhub_local.train.lineage import lineage_of
from adapterhub_local.train.log_curves import draw
from adapterhub_local.train.optimise import STOPS, fit, reason_of
from adapterhub_local.train.past_runs import CURVE, RECORD, REPORT, read_log
from adapterhub_local.train.preflight import Preflight, preflight
from adapterhub_local.train.report import write_report
from adapterhub_local.train.run_folder import Run
from adapterhub_local.train.samples import take_samples
from adapterhub_local.train.session import Inputs, Session, load, read_inputs
from adapterhub_local.train.shards import shards_of
from adapterhub_local.train.trainer import make_trainer
from adapterhub_local.train.watch import Watch


def train(
    recipe: Recipe,
    home: Home,
    *,
    resume: bool = False,
    restart: bool = False,
    reporter: Reporter | None = None,
    shard_base: bool = False,
) -> Version:
    """Train the adapter a recipe describes, evaluate it beside its base, and register it as a version.

    A run that is stopped (Ctrl-C, SIGTERM) keeps its state under `runs/`; `resume` continues from there and
    ends with the same adapter, `restart` throws that state away. With `shard_base` each of several processes holds a
    part of the base. Raises Stopped, and the InputErrors of recipe, base and data before anything is written.
    """
    assert process().is_leader, "other processes follow"
    recipe, choices = settle(recipe, home, process().world_size if shard_base else 1)
    kept = Keeping(reporter or Quiet())
    for choice in choices:
        kept.note(str(choice))
    inputs = read_inputs(recipe, home, kept, shard_base=shard_base)
    with inputs.run.alone(), missing_others():
        if resume and (known := inputs.run.registered()):
            return Registry(home).resolve(known)
        checkpoint = inputs.run.find_checkpoint(resume=resume, restart=restart)
        if resume and checkpoint is None and reporter:
            reporter.note("there is no state to continue from yet: the run begins")
        return _train(inputs, checkpoint, kept, choices)


def _train(inputs: Inputs, checkpoint: Path | None, reporter: Keeping, choices: Sequence[Choice]) -> Version:
    session = load(inputs, reporter)
    run, model, tests = session.run, session.model, session.tests
    recipe, home = run.recipe, run.home
    run.notes = reporter.notes
    before = {name: factor.detach().cpu().clone() for name, factor in factors_of(model).items()}
    fitted = fit(session, checkpoint, reporter)
    shards = shards_of(model)
    with keeping(run, fitted.save_state), shards.leading() if shards else nullcontext():
        check_changed(before, factors_of(model), recipe.train.objective)
        model.eval()
        scores: dict[str, AnyScore] = {}
        if tests:
            with reporter.counting("evaluating the adapter") as progress:
                scores["adapter"] = _score(session, progress)
            with model.disable_adapter(), reporter.counting("evaluating the base") as progress:
                scores["base"] = _score(session, progress)
        samples = take_samples(model, session.tokenizer, [item.parts[0] for item in tests], recipe.eval.samples)
        with staging(home.tmp) as folder:
            files = save(model, recipe, run.info, folder)
            statistics = fitted.statistics | session.counts
            lineage = lineage_of(run, model, scores, statistics, len(session.examples), samples)
            lineage["notes"] = reporter.notes
            if tests and recipe.train.objective not in ("sft", "grpo"):  # grpo's rewards are scored above
                rewards = fitted.objective.held_out(tests, recipe.eval.batch_size)
                found = {name.removeprefix("eval_"): round(value, 6) for name, value in rewards.items()}
                found["objective_loss"] = found.pop("loss")
                lineage["metrics"][recipe.task]["adapter"] |= found
            if choices:
                lineage["strategy"] = [choice.to_json() for choice in choices]
            published, refusal = _publish(Registry(home), recipe.output.name, files, lineage, recipe.output.alias)
    entries = read_log(run.folder)
    page = write_report(str(published), lineage, entries, [sample.to_json() for sample in samples])
    try:
        (run.folder / REPORT).write_text(page, encoding="utf-8")
        (run.folder / CURVE).write_text(draw(entries, str(published)), encoding="utf-8")
        run.finish(str(published), scores["adapter"].loss if scores else None)
    except OSError as error:
        raise QhubError(f"{published} is registered, but its report cannot be written: {reason_of(error)}") from None
    if refusal is not None:
        raise Protected(f"{published} is registered, without its alias: {refusal}")
    return published


def _score(session: Session, progress: Counting) -> AnyScore:
    """The model as it is, in evaluation mode, on what is held out, and what the recipe asks beside."""
    model, tests, size = session.model, session.tests, session.run.recipe.eval.batch_size
    found = score_items(model, tests, size, progress)
    if session.checks is None:
        return found
    assert isinstance(found, Score), "pairs are not checked"
    return checked(found, model, session.tokenizer, tests, session.checks, size, progress)  # type: ignore[arg-type]


def _publish(
    registry: Registry, name: str, files: Mapping[str, Path | bytes], lineage: dict[str, Any], alias: str | None
) -> tuple[Version, Protected | None]:
    """The new version, and why it could not get its alias: hours of training are not lost for that."""
    try:
        return registry.publish(name, files, lineage, alias=alias), None
    except Protected as error:
        return registry.publish(name, files, lineage), error


def check_changed(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], objective: str = "sft"
) -> None:
    """Raise QhubError if training has left every factor as it was: the result would be its start."""
    if not all(torch.equal(tensor, after[name].detach().cpu()) for name, tensor in before.items()):
        return
    way = "raise train.learning_rate or the number of steps, or look at what is learned with `qhub data preview`"
    if objective == "grpo":
        way = (
            "all answers to a prompt were worth the same, so there was nothing to learn from. Reward what the model "
            "does sometimes, or draw more answers (reward.samples)"
        )
    raise QhubError(f"the adapter is what it was at its start, so nothing is registered: {way}")


@contextmanager
def keeping(run: Run, save_state: Callable[[], None]) -> Iterator[None]:
    """What follows the last step: stopped or failed, it keeps the trained factors for --resume to continue from."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with handling(STOPS[1:], stop):
        try:
            yield
        except BaseException as error:
            save_state()
            by_user = isinstance(error, KeyboardInterrupt)
            reason = "stopped after the last step" if by_user else f"{type(error).__name__}: {error}"[:300]
            run.note(status="stopped" if by_user else "failed", reason=reason)
            if by_user:
                raise Stopped(
                    "stopped after the last step, before the adapter was registered; the state is kept in "
                    f"{run.folder}. To continue, run the same command with --resume"
                ) from None
            raise


def follow(
    recipe: Recipe, home: Home, *, resume: bool = False, restart: bool = False, shard_base: bool = False
) -> None:
    """Take part in the run of another process (rank 0 of several), which evaluates and registers the result."""
    recipe, _ = settle(recipe, home, process().world_size if shard_base else 1)
    inputs = read_inputs(recipe, home, Quiet(), shard_base=shard_base)
    if resume and inputs.run.registered():
        return
    checkpoint = inputs.run.find_checkpoint(resume=resume, restart=restart)
    with missing_others():
        session = load(inputs, Quiet())
        fit(session, checkpoint, Quiet())
        if shards := shards_of(session.model):
            shards.give()
    if not (inputs.run.folder / RECORD).exists():  # a machine with a home of its own: the leader's has the run
        shutil.rmtree(inputs.run.folder, ignore_errors=True)


def try_out(recipe: Recipe, home: Home, reporter: Reporter, *, shard_base: bool = False) -> Preflight:
    """Everything up to the first step, and that step; leaves nothing behind."""
    recipe, _ = settle(recipe, home, process().world_size if shard_base else 1)
    session = load(read_inputs(recipe, home, reporter, shard_base=shard_base), reporter)
    with quiet_loading(), staging(home.tmp) as folder:
        trainer = make_trainer(
            session.model, session.examples, recipe, folder, Watch(lambda entry: None), session.tokenizer,
            session.run.info,
        )  # fmt: skip
        return preflight(trainer, session.examples, home)
