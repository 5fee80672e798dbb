"""What a run can minimise: its name, the data it learns from, and the keys of [preference] that it reads. No torch."""

from dataclasses import dataclass
from typing import Any

from adapterhub_local.recipe.field import between, key, one_of
from adapterhub_local.recipe.reward import check_reward

ANSWERS, PAIRS, JUDGED = "answers", "pairs", "judged"  # what a row of the data is
ANY = "any"  # pairs if a file's first row is one, else answers: of a file to be scored on
JUDGING = ("preference", "judged")  # values of data.format
FORMATS_OF = {ANSWERS: (), PAIRS: ("preference",), JUDGED: ("preference", "judged")}
REFERENCES = ("start", "base")


@dataclass(frozen=True)
class ObjectiveKind:
    """`shape`: what a row of the data must be. `beta`: the default of its strength; None: it has none.

    keys: those of [preference] that it reads beside `beta`. has_reference: its loss compares with the model before.
    """

    shape: str
    source: str
    beta: float | None = None
    keys: tuple[str, ...] = ()

    @property
    def learned(self) -> int:
        """How many answers of an item gradients flow through: both of a pair, the one that is judged."""
        return 2 if self.shape == PAIRS else 1

    @property
    def has_reference(self) -> bool:
        return "reference" in self.keys


OBJECTIVES = {
    "sft": ObjectiveKind(ANSWERS, "the likelihood of answers"),
    "dpo": ObjectiveKind(
        PAIRS, "arXiv 2305.18290, Eq. 7", 0.1, ("reference", "label_smoothing", "sft_weight")
    ),
    "ipo": ObjectiveKind(PAIRS, "arXiv 2310.12036, Eq. 17", 0.1, ("reference", "sft_weight")),
    "simpo": ObjectiveKind(PAIRS, "arXiv 2405.14734, Eq. 6", 2.0, ("margin", "label_smoothing", "sft_weight")),
    "orpo": ObjectiveKind(PAIRS, "arXiv 2403.07691, Eq. 6", 0.1),
    "kto": ObjectiveKind(
        JUDGED, "arXiv 2402.01306, Eq. 8", 0.1, ("reference", "desirable_weight", "undesirable_weight")
    ),
    "grpo": ObjectiveKind(ANSWERS, "arXiv 2402.03300, Eq. 3"),
}  # fmt: skip


def users_of(name: str) -> str:
    """The objectives that read a key of [preference], as docs list them."""
    return ", ".join(kind for kind, row in OBJECTIVES.items() if name in row.keys)


@dataclass(frozen=True)
class Preference:
    beta: float | None = key(
        "how strongly preferences count against staying near the reference (dpo, ipo, kto), scale of the reward "
        "(simpo), weight of the odds ratio (orpo); "
        + ", ".join(f"{row.beta:g} for {kind}" for kind, row in OBJECTIVES.items() if row.beta) + " if not given",
        None,
        between(1e-4, 100),
    )  # fmt: skip
    reference: str = key(
        "what the model is compared with: start (the base, or the version of adapter.from), or base; "
        f"for {users_of('reference')}",
        "start",
        one_of(*REFERENCES),
    )
    label_smoothing: float = key(
        f"share of pairs that are taken to be labelled the wrong way round; for {users_of('label_smoothing')}",
        0.0,
        between(0, 0.49),
    )
    margin: float = key(
        f"by how much the reward of the chosen answer is to lie above the other's; for {users_of('margin')}",
        0.5,
        between(0, 100),
    )
    sft_weight: float = key(
        "weight of the negative log-likelihood of chosen answers, a token, that is added to the loss; for "
        + users_of("sft_weight"),
        0.0,
        between(0, 100),
    )
    desirable_weight: float = key(
        f"weight of answers judged good; for {users_of('desirable_weight')}", 1.0, between(0, 100)
    )
    undesirable_weight: float = key(
        f"weight of answers judged bad; for {users_of('undesirable_weight')}", 1.0, between(0, 100)
    )


def beta_of(objective: str, preference: Preference) -> float:
    """The recipe's beta, or the objective's own."""
    beta = preference.beta if preference.beta is not None else OBJECTIVES[objective].beta
    assert beta is not None, f"{objective} has no beta"
    return beta


def _is_default(values: dict[str, Any], full: str) -> bool:
    """Whether a key of [preference], [reward] or [eval] was given the value that it has anyway."""
    table, _, name = full.partition(".")
    own = values.get(table)
    if table not in ("preference", "reward", "eval") or own is None:
        return False
    return bool(getattr(own, name, None) == getattr(type(own)(), name, None))


def check_objective(values: dict[str, Any], given: set[str]) -> list[tuple[str, str, str]]:
    """What does not fit a recipe's objective: (table, key, message). `given`: keys written, as `preference.beta`."""
    train, data = values.get("train"), values.get("data")
    if train is None:
        return []
    name, kind = train.objective, OBJECTIVES[train.objective]
    given = {full for full in given if not _is_default(values, full)}  # a resolved recipe names every key
    problems = check_reward(name, values.get("reward"), given)
    for full in sorted(given):
        table, _, wanted = full.partition(".")
        if table == "preference" and wanted not in (("beta",) if kind.beta else ()) + kind.keys:
            users = users_of(wanted) or ", ".join(kind for kind, row in OBJECTIVES.items() if row.beta)
            problems.append((table, wanted, f"preference.{wanted} is for train.objective = {users}, not '{name}'"))
    if data is None:
        return problems
    asked = values.get("eval")
    if asked is not None and asked.tool_calls and kind.shape != ANSWERS:
        message = f"eval.tool_calls is for rows with one answer, and '{name}' compares two: use qhub eval --tool-calls"
        problems.append(("eval", "tool_calls", message))
    if asked is not None and not asked.tool_calls and "eval.max_new_tokens" in given:
        problems.append(("eval", "max_new_tokens", "eval.max_new_tokens is for eval.tool_calls = true"))
    allowed = FORMATS_OF[kind.shape]
    if data.format != "auto" and (data.format not in allowed if allowed else data.format in JUDGING):
        wanted = " or ".join(allowed) or "answers"
        message = f"data.format = '{data.format}' is not for '{name}', whose data are {wanted}"
        problems.append(("data", "format", message))
    if kind.shape == ANSWERS:
        return problems
    for column in ("prompt", "answer", "system"):
        if f"data.{column}" in given:
            message = (
                f"data.{column} makes one answer a row, and '{name}' compares answers: name columns by data.columns"
            )
            problems.append(("data", column, message))
    if data.loss_on == "all":
        problems.append(("data", "loss_on", f"data.loss_on = 'all' is for 'sft': '{name}' compares last answers"))
    return problems
