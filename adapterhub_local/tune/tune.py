"""Search the merge that does best on held-out data of several tasks, without gradients.

Every trial is the real merge scored on the real base (LoraHub, https://arxiv.org/abs/2307.13269, does the same with
another search). What was scored is kept in `runs/`, so a stopped search continues where it stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_local.durable import canonical_json, digest_bytes, replacing
from adapterhub_local.errors import InputError
from adapterhub_local.evaluate.gate import Bench, record
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.layers import Weight
from adapterhub_local.merge.plan import MergePlan
from adapterhub_local.merge.plan_file import WrittenPlan
from adapterhub_local.merge.plan_text import plan_text
from adapterhub_local.merge.tuning import Tuning
from adapterhub_local.settings import Home
from adapterhub_local.tune.candidate import Space
from adapterhub_local.tune.gradient import by_gradient
from adapterhub_local.tune.pattern import by_pattern
from adapterhub_local.tune.sampled import by_sampler
from adapterhub_local.tune.scorer import Scorer, Spent, Trial

Opened = Callable[[Sequence[Weight], Formula | None], MergePlan]
NAMES = {"pattern": "hooke-jeeves", "gradient": "lora-soups"}  # of searches that are not optuna's, in lineages
OnTrial = Callable[[Trial, Scorer], None]


@dataclass(frozen=True)
class Found:
    """Every trial in order, the first as the plan is written; the best of them; of several tasks, the front.

    `plans` are files of the folder that say the best merge and those of the front: `qhub merge` takes them.
    """

    trials: list[Trial]
    best: Trial
    front: list[Trial]
    plans: list[Path]
    seconds: float
    spent: float


def tune(opened: Opened, written: WrittenPlan, bench: Bench, home: Home, on_trial: OnTrial | None = None) -> Found:
    """Search as [tune] says. `on_trial` gets each trial and the scorer, which knows the best so far and what is spent.

    The objective is the mean over tasks of the loss, or of 1 - exact match with the loss to decide between equals.
    """
    tuning = written.tune
    assert tuning is not None, "the plan says how it is tuned"
    space = Space.of(written)
    plan = opened(space.first().weights, space.first().formula(written.formula))
    folder = home.runs / f"tune-{_identity(plan, bench, written.alphas)}"
    best: Trial | None = None

    def seen(trial: Trial) -> None:
        nonlocal best
        if trial.is_whole and trial is scorer.best and trial is not best:
            best = trial
            _write(folder / "best.toml", best, plan, written)
        if on_trial is not None:
            on_trial(trial, scorer)

    scorer = Scorer(
        lambda candidate: opened(candidate.weights, candidate.formula(written.formula)),
        tuning,
        bench,
        home.tmp,
        folder / "trials.jsonl",
        seen,
    )
    with suppress(Spent):
        if tuning.search == "pattern":
            by_pattern(space, scorer)
        elif tuning.search == "gradient":
            by_gradient(space, scorer, plan, bench, tuning)
        else:
            by_sampler(space, scorer, tuning)
    if not scorer.trials:
        raise InputError("no weights of this plan can be merged: change the start or the method")
    plans = [folder / "best.toml"]
    for old in folder.glob("front-*.toml"):
        old.unlink(missing_ok=True)
    front = scorer.front if tuning.pareto else []
    for number, trial in enumerate(front, 1):
        plans.append(folder / f"front-{number}.toml")
        _write(plans[-1], trial, plan, written)
    return Found(scorer.trials, scorer.best, front, plans, scorer.seconds, scorer.spent)


def lineage(tuning: Tuning, bench: Bench, found: Found) -> dict[str, Any]:
    """What the tuned version records of the search."""
    searched = {
        "search": NAMES.get(tuning.search, f"optuna-{tuning.search}"),
        **({"seed": tuning.seed} if tuning.search != "pattern" else {}),
        **({"groups": tuning.groups} if tuning.groups > 1 else {}),
        **({"methods": list(tuning.methods)} if tuning.methods else {}),
        **({"front": [found.trials.index(trial) for trial in found.front]} if tuning.pareto else {}),
    }
    return {
        **{key: getattr(tuning, key) for key in ("metric", "low", "high", "evaluations", "early_stop")},
        **searched,
        "spent": round(found.spent, 4),
        "data": record(bench.held),
        "limit": bench.held.limit,
        "best": found.trials.index(found.best),
        "trail": [trial.to_json() for trial in found.trials],
    }


def _identity(plan: MergePlan, bench: Bench, alphas: Sequence[float | None]) -> str:
    """Of what scores depend on beside the candidate: 12 hex digits."""
    decisive = {
        "parents": [[parent.digest, parent.converted] for parent in plan.parents],
        "alphas": list(alphas),
        "kept": [str(plan.formula.rule), plan.formula.space, plan.formula.dtype, plan.formula.compact],
        "base": bench.base.info.fingerprint,
        "data": record(bench.held),
        "limits": [bench.held.limit, bench.held.max_length],
    }
    return digest_bytes(canonical_json(decisive)).removeprefix("sha256:")[:12]


def _write(path: Path, trial: Trial, plan: MergePlan, written: WrittenPlan) -> None:
    """The trial's merge as a plan, whole or not at all: exact references, and files by their full paths."""
    labels = [
        str(parent.version) if parent.version is not None else str(Path(parent.label).expanduser().absolute())
        for parent in plan.parents
    ]
    scores = [f"{task}: loss {score.loss:.4f}, exact match {score.exact_match:.1%}" for task, score in
              trial.scores.items()]  # fmt: skip
    others: Mapping[str, Any] = {
        "force": written.force,
        "with_base": written.with_base,
        "dora_rank": written.dora_rank,
    }
    text = plan_text(
        labels,
        trial.candidate.weights,
        written.alphas,
        trial.candidate.formula(written.formula),
        others,
        "\n".join(["Found by `qhub tune-merge`; `qhub merge` on this file makes it.", *scores]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")
