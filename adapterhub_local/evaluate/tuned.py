"""A written merge whose weights are searched on held-out data, and the best of which is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub_local.errors import Stopped
from adapterhub_local.evaluate.gate import Requirement, base_for, check_held, judge, open_bench
from adapterhub_local.evaluate.merging import Merged, put, required
from adapterhub_local.evaluate.tune import Trial, lineage, tune
from adapterhub_local.hub.adapters import opening
from adapterhub_local.merge.plan_file import WrittenPlan
from adapterhub_local.progress import Quiet, Reporter
from adapterhub_local.registry import Registry

if TYPE_CHECKING:
    from adapterhub_local.base.load import LoadedBase


@dataclass(frozen=True)
class Tuned:
    """Every trial in order, the best, the merge that it is, and what the lineage says of the search."""

    trials: list[Trial]
    best: Trial
    merged: Merged
    lineage: dict[str, Any]


def tuned_merge(
    written: WrittenPlan,
    registry: Registry,
    *,
    reporter: Reporter | None = None,
    told: Callable[[Trial, Trial], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Tuned:
    """Search the weights of `written` as its [tune] says, and put the best merge where `written` says.

    `told` gets each trial and the best so far. Raises Stopped at Ctrl-C: the trials are kept, and the same call
    continues after them. If the plan has [evaluate], the best must meet its requirements.
    """
    from adapterhub_local.base.load import load_base

    tuning, scored, show = written.tune, written.evaluate, reporter or Quiet()
    assert tuning is not None, "the plan says how it is tuned"
    check_held(tuning.scored)
    requirements = [Requirement.parse(text) for text in scored.require] if scored else []
    if scored:
        check_held(scored, requirements)
    done = 0
    with opening(written, registry, note=note) as opened:
        base = opened(written.weights).base
        loaded: LoadedBase = load_base(base_for(base, registry.home))
        bench = open_bench(loaded, tuning.scored)
        gate = judge(base, scored, requirements, registry.home, show, loaded=loaded) if scored else None
        try:
            with show.counting("tuning") as progress:

                def seen(trial: Trial, best: Trial) -> None:
                    nonlocal done
                    done += 1
                    if told is not None:
                        told(trial, best)
                    progress(done, tuning.evaluations)

                trials, best = tune(opened, written.weights, tuning, bench, registry.home, seen)
        except KeyboardInterrupt:
            raise Stopped(
                f"stopped after {done} of {tuning.evaluations} trials, which are kept: the same command continues"
            ) from None
        kept = {"tuning": lineage(tuning, bench, trials, best), **required(written)}
        return Tuned(trials, best, put(opened(best.weights), written, registry, gate, kept), kept)
