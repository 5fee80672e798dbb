"""Several merges of the same adapters, side by side: what each answers to a few held-out examples, and how well.

No merge is kept: each lies in a folder for as long as it is asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_local.errors import InputError
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.plan_file import WrittenPlan
from adapterhub_local.progress import Quiet, Reporter
from adapterhub_local.recipe.objectives import ANSWERS, OBJECTIVES
from adapterhub_local.recipe.recipe import Recipe
from adapterhub_local.registry import Registry, Version

if TYPE_CHECKING:
    from adapterhub_local.base.load import LoadedBase
    from adapterhub_local.base.model import CausalModel
    from adapterhub_local.evaluate.metrics import Score
    from adapterhub_local.merge.plan import MergePlan
    from adapterhub_local.rows.examples import Example

MAX_METHODS, MAX_EXAMPLES = 4, 20
MAX_NEW_TOKENS = 128  # of an answer; most data wants fewer
BATCH, MAX_LENGTH = 8, 1024
LONGEST = 4000  # letters of a text that is kept


@dataclass(frozen=True)
class Column:
    """What one of those that are asked gave: its answers as text, and its score; of a merge its report, too."""

    name: str
    answers: list[str]
    score: "Score"
    merge: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        of_merge = {name: self.merge[name] for name in ("rank", "relative_error")} if self.merge else {}
        return {"name": self.name, **of_merge, "scores": self.score.to_json_with_intervals()}


def side_by_side(
    written: WrittenPlan,
    formulas: Mapping[str, Formula],
    recipe: Recipe,
    registry: Registry,
    *,
    limit: int = 10,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """The base and each merge on the first held-out examples of a recipe: scores, and every answer beside the wanted.

    `formulas` are named by how they are spelled. Raises InputError for data of another kind, and what merging, reading
    data and loading the base raise; mistakes in what is asked come before the base is loaded.
    """
    if not 1 <= len(formulas) <= MAX_METHODS:
        raise InputError(f"compare 1 to {MAX_METHODS} methods, not {len(formulas)}")
    if OBJECTIVES[recipe.train.objective].shape != ANSWERS:
        raise InputError(f"the answers of {recipe.path.name} are judged, none is wanted: choose another recipe")
    from adapterhub_local.base.load import compute_dtype, load_base
    from adapterhub_local.data.dataset import read_data
    from adapterhub_local.evaluate.evaluate import read_tests
    from adapterhub_local.evaluate.gate import base_for
    from adapterhub_local.hub.adapters import opening

    with opening(written, registry, fetch=False) as opened:
        plans = {name: opened(written.weights, formula) for name, formula in formulas.items()}
        first = next(iter(plans.values()))
        info = base_for(first.base, registry.home)
        dataset = read_data(recipe)
        chats = dataset.test[:limit]
        if not chats:
            raise InputError(f"{recipe.path.name} holds out no example: give it data.test, or a data.test_share")
        base = load_base(info, dtype=compute_dtype())
        tests = read_tests(base, chats, recipe.data, info.within(MAX_LENGTH)).examples
        columns = [_column(base, None, info.name, tests, reporter)]
        for name, plan in plans.items():
            columns.append(_merged(base, plan, name, tests, registry, reporter))
    parents = [parent.version for parent in first.parents if parent.version is not None]
    return {
        "task": recipe.task,
        "recipe": recipe.path.name,
        "data": dataset.test_digest,
        "known_to": [str(one) for one in parents if dataset.test_digest in _scored_on(one, registry)],
        "rows": len(tests),
        "rows_held_out": len(dataset.test),
        "columns": [column.to_json() for column in columns],
        "examples": _examples(base, tests, columns),
    }


def _merged(
    base: "LoadedBase", plan: "MergePlan", name: str, tests: "Sequence[Example]", registry: Registry,
    reporter: Reporter | None,
) -> Column:  # fmt: skip
    from adapterhub_local.durable import staging
    from adapterhub_local.merge.merge import merge_to_path

    with staging(registry.home.scratch) as folder:
        report = merge_to_path(plan, folder / "merged")
        return _column(base, folder / "merged", name, tests, reporter, report.to_json())


def _column(
    base: "LoadedBase", folder: Path | None, name: str, tests: "Sequence[Example]", reporter: Reporter | None,
    merge: dict[str, Any] | None = None,
) -> Column:  # fmt: skip
    from adapterhub_local.evaluate.evaluate import adapted
    from adapterhub_local.evaluate.metrics import evaluate

    with (reporter or Quiet()).counting(f"asking {name}") as progress, adapted(base, folder) as model:
        score = evaluate(model, tests, BATCH)
        return Column(name, _answers(base, model, tests, progress), score, merge)


def _answers(base: "LoadedBase", model: "CausalModel", tests: "Sequence[Example]", progress: Any) -> list[str]:
    """What greedy decoding writes, a little longer than what is wanted."""
    from adapterhub_local.evaluate.written import write_ids

    longest = max(test.spans[-1][1] - test.spans[-1][0] for test in tests)
    written = write_ids(model, base.tokenizer, tests, min(MAX_NEW_TOKENS, 2 * longest + 8), BATCH, progress)
    return [str(base.tokenizer.decode(ids, skip_special_tokens=True))[:LONGEST] for ids in written]


def _examples(base: "LoadedBase", tests: "Sequence[Example]", columns: Sequence[Column]) -> list[dict[str, Any]]:
    found = []
    for index, test in enumerate(tests):
        start, end = test.spans[-1]
        parts = list(test.ids[:start]), list(test.ids[start:end])
        prompt, wanted = (str(base.tokenizer.decode(ids, skip_special_tokens=True)) for ids in parts)
        answers = [
            {"text": column.answers[index], "is_exact": column.score.hits["exact_match"][index]} for column in columns
        ]
        found.append({"prompt": prompt[-LONGEST:], "wanted": wanted[:LONGEST], "answers": answers})
    return found


def _scored_on(version: Version, registry: Registry) -> set[str]:
    """The digests of the held-out data that a version's own run, and its scores, speak of."""
    entries = version.lineage.get("data")
    entries = entries if isinstance(entries, list) else []
    digests = [one.get("digest") for one in entries if isinstance(one, dict) and one.get("role") == "test"]
    digests += [one.get("data") for one in registry.metrics(version).values() if isinstance(one, dict)]
    return {digest for digest in digests if isinstance(digest, str)}
