"""A written merge that is searched on held-out data, and the best of which is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub_local.errors import Stopped
from adapterhub_local.evaluate.gate import Requirement, base_for, check_held, judge, open_bench
from adapterhub_local.evaluate.merging import Merged, put, required
from adapterhub_local.hub.adapters import opening
from adapterhub_local.merge.plan_file import WrittenPlan
from adapterhub_local.merge.tuning import SAMPLERS
from adapterhub_local.progress import Quiet, Reporter
from adapterhub_local.registry import Registry
from adapterhub_local.tune.candidate import Space
from adapterhub_local.tune.scorer import Scorer, Trial
from adapterhub_local.tune.tune import Found, lineage, tune

if TYPE_CHECKING:
    from adapterhub_local.base.load import LoadedBase


@dataclass(frozen=True)
class Tuned:
    """What the search found, the merge that the best is, and what the lineage says of the search."""

    found: Found
    merged: Merged
    lineage: dict[str, Any]


def tuned_merge(
    written: WrittenPlan,
    registry: Registry,
    *,
    reporter: Reporter | None = None,
    on_trial: Callable[[Trial, Scorer], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Tuned:
    """Search the merge `written` as its [tune] says, and put the best where `written` says.

    `on_trial` gets each trial and the scorer. Raises Stopped at Ctrl-C: what was scored is kept, the best so far is a
    plan in the folder of the search, and the same call continues. If the plan has [evaluate], the best must meet its
    requirements.
    """
    from adapterhub_local.base.load import compute_dtype, load_base

    tuning, scored, show = written.tune, written.evaluate, reporter or Quiet()
    assert tuning is not None, "the plan says how it is tuned"
    if tuning.search in SAMPLERS:
        from adapterhub_local.tune.sampled import package

        package(tuning.search)  # before anything heavy is loaded
    check_held(tuning.scored)
    requirements = [Requirement.parse(text) for text in scored.require] if scored else []
    if scored:
        check_held(scored, requirements)
    state: Scorer | None = None
    with opening(written, registry, note=note) as opened:
        first = Space.of(written).first()
        base = opened(first.weights, first.formula(written.formula)).base  # what does not fit is refused here
        loaded: LoadedBase = load_base(base_for(base, registry.home), dtype=compute_dtype())
        bench = open_bench(loaded, tuning.scored)
        gate = judge(base, scored, requirements, registry.home, show, loaded=loaded) if scored else None
        try:
            with show.counting("tuning") as progress:

                def seen(trial: Trial, scorer: Scorer) -> None:
                    nonlocal state
                    state = scorer
                    if on_trial is not None:
                        on_trial(trial, scorer)
                    progress(int(scorer.spent), tuning.evaluations)

                found = tune(opened, written, bench, registry.home, seen)
        except KeyboardInterrupt:
            if state is None:
                raise Stopped("stopped before anything was scored") from None
            raise Stopped(
                f"stopped after {len(state.trials)} trials, {state.spent:.1f} of {tuning.evaluations} evaluations, "
                f"which are kept: the same command continues. The best so far: qhub merge "
                f"{state.path.with_name('best.toml')}"
            ) from None
        kept = {"tuning": lineage(tuning, bench, found), **required(written)}
        best = found.best.candidate
        plan = opened(best.weights, best.formula(written.formula))
        return Tuned(found, put(plan, written, registry, gate, kept), kept)
