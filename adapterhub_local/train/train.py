"""A training run from recipe to registered version: the main line of `qhub train`."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.base.load import quiet_loading
from adapterhub_local.durable import staging
from adapterhub_local.errors import QhubError, Stopped
from adapterhub_local.evaluate.metrics import evaluate
from adapterhub_local.plan.auto import settle
from adapterhub_local.progress import Keeping, Quiet, Reporter
from adapterhub_local.recipe import Recipe
from adapterhub_local.registry import Registry, Version
from adapterhub_local.settings import Home, process
from adapterhub_local.signals import handling
from adapterhub_local.train.adapter import factors_of, save
from adapterhub_local.train.lineage import lineage_of
from adapterhub_local.train.log_curves import draw
from adapterhub_local.train.optimise import STOPS, fit, told
from adapterhub_local.train.past_runs import CURVE, RECORD, REPORT, read_log
from adapterhub_local.train.preflight import Preflight, preflight
from adapterhub_local.train.report import write_report
from adapterhub_local.train.run_folder import Run
from adapterhub_local.train.samples import take_samples
from adapterhub_local.train.session import prepare
from adapterhub_local.train.trainer import make_trainer


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
    reporter = kept = Keeping(reporter)
    for choice in choices:
        reporter.note(str(choice))
    session = prepare(recipe, home, reporter, find_checkpoint)
    run, model, tests = session.run, session.model, session.tests
    run.notes = kept.notes
    before = {name: factor.detach().cpu().clone() for name, factor in factors_of(model).items()}
    fitted = fit(session, reporter)
    with keeping(run, fitted.save_state):
        check_changed(before, factors_of(model))
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
            lineage["notes"] = kept.notes
            if choices:
                lineage["strategy"] = [choice.to_json() for choice in choices]
            published = Registry(home).publish(recipe.output.name, files, lineage, alias=recipe.output.alias)
    entries = read_log(run.folder)
    page = write_report(str(published), lineage, entries, [sample.to_json() for sample in samples])
    try:
        (run.folder / REPORT).write_text(page, encoding="utf-8")
        (run.folder / CURVE).write_text(draw(entries, str(published)), encoding="utf-8")
        run.finish(str(published), scores["adapter"].loss if scores else None)
    except OSError as error:
        raise QhubError(f"{published} is registered, but its report cannot be written: {told(error)}") from None
    return published


def check_changed(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
    """Raise QhubError if training has left every factor as it was: the result would be its start."""
    if all(torch.equal(tensor, after[name].detach().cpu()) for name, tensor in before.items()):
        raise QhubError(
            "the adapter is what it was at its start, so nothing is registered: raise train.learning_rate or "
            "train.epochs, or look at what is learned with `qhub data preview`"
        )


@contextmanager
def keeping(run: Run, save_state: Callable[[], None]) -> Iterator[None]:
    """What follows the last step: stopped or failed, it keeps the trained factors, and --resume goes on from there."""

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
                    f"{run.folder}. Go on: the same command with --resume"
                ) from None
            raise


def follow(recipe: Recipe, home: Home, *, resume: bool = False, restart: bool = False) -> None:
    """Take part in the run of another process (rank 0 of several), which evaluates and registers the result."""
    recipe, _ = settle(recipe, home)
    session = prepare(recipe, home, Quiet(), lambda run: run.find_checkpoint(resume=resume, restart=restart))
    fit(session, Quiet())
    if not (session.run.folder / RECORD).exists():  # a machine with a home of its own: the leader's has the run
        shutil.rmtree(session.run.folder, ignore_errors=True)


def try_out(recipe: Recipe, home: Home, reporter: Reporter) -> Preflight:
    """Everything up to the first step, and that step; leaves nothing behind."""
    recipe, _ = settle(recipe, home)
    session = prepare(recipe, home, reporter, lambda run: None)
    with quiet_loading(), staging(home.tmp) as folder:
        trainer, _ = make_trainer(session.model, session.examples, recipe.train, folder, lambda entry: None)
        return preflight(trainer, session.examples, home)
