"""A gate that scores an adapter on held-out tasks before it is registered, and refuses it where it falls short.

Light until it scores: requirements are parsed and data files looked for before torch is loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_local.bounds import Bound, split_bound
from adapterhub_local.counts import counted
from adapterhub_local.durable import digest_file
from adapterhub_local.errors import Incompatible, InputError, NotFound, QhubError
from adapterhub_local.settings import Home

if TYPE_CHECKING:
    from adapterhub_local.base.bases import BaseInfo
    from adapterhub_local.base.load import LoadedBase
    from adapterhub_local.evaluate.metrics import Score
    from adapterhub_local.merge.tuning import Scored
    from adapterhub_local.progress import Reporter
    from adapterhub_local.rows.examples import Example

METRICS = ("exact_match", "loss")


@dataclass(frozen=True)
class Requirement:
    """A bound on a task's score: `sentiment.exact_match>=0.8`."""

    task: str
    metric: str
    bound: Bound

    @classmethod
    def parse(cls, text: str) -> "Requirement":
        """The requirement that `text` spells. Raises InputError."""
        score, bound = split_bound(text) or ("", None)
        task, _, metric = score.rpartition(".")
        if bound is None or bound.operator == "=" or not task or metric not in METRICS:
            shown = text.encode("unicode_escape").decode()[:80]
            raise InputError(
                f"'{shown}' is not a requirement: write task, metric ({' or '.join(METRICS)}) and bound, such as "
                "'sentiment.exact_match>=0.8'"
            )
        return cls(task, metric, bound)

    def __str__(self) -> str:
        return f"{self.task}.{self.metric}{self.bound}"


def check_held(held: "Scored", requirements: Sequence[Requirement] = ()) -> None:
    """Raises NotFound for a missing file, InputError for a requirement without data."""
    for path in held.data.values():
        if not path.is_file():
            raise NotFound(f"there is no data file {path}")
    for requirement in requirements:
        if requirement.task not in held.data:
            raise InputError(f"{requirement} cannot be checked without data: give --data {requirement.task}=FILE.jsonl")


def record(held: "Scored") -> list[dict[str, Any]]:
    """What a lineage says of the data: no path of this machine."""
    return [{"task": task, "file": path.name, "digest": digest_file(path)} for task, path in held.data.items()]


@dataclass(frozen=True)
class Bench:
    """A loaded base and the tokenised examples of each task."""

    base: "LoadedBase"
    tests: Mapping[str, "list[Example]"]
    held: "Scored"

    def score(self, folder: Path, reporter: "Reporter | None" = None) -> dict[str, "Score"]:
        """The scores of the adapter in `folder`, by task."""
        from adapterhub_local.evaluate.evaluate import score_folder
        from adapterhub_local.progress import Quiet

        scores = {}
        for task, tests in self.tests.items():
            with (reporter or Quiet()).counting(f"scoring {task}") as progress:
                scores[task] = score_folder(self.base, folder, tests, self.held.batch_size, progress)
        return scores


def open_bench(base: "LoadedBase", held: "Scored") -> Bench:
    """Tokenise the tasks for `base`. Raises BadData with file and line."""
    from adapterhub_local.base.chat_template import stop_tokens
    from adapterhub_local.rows.examples import read_chats, tokenise

    stops = stop_tokens(base.info.folder, base.tokenizer)
    tests = {
        task: tokenise(read_chats(path, held.limit), base.tokenizer, base.info.within(held.max_length), stops=stops)
        for task, path in held.data.items()
    }
    return Bench(base, tests, held)


def base_for(known: Mapping[str, Any], home: Home) -> "BaseInfo":
    """The base of this home that a merge's parents were made for. Raises Incompatible if it is not here."""
    from adapterhub_local.base.bases import list_bases
    from adapterhub_local.base.origin import Origin, best

    origin = Origin.of_lineage(known)
    if origin.is_known:
        found = best(origin, list_bases(home))
        if found is not None:
            return found
        name = known.get("hub_id") or known.get("name") or "an unknown model"
        which = (origin.fingerprint or origin.hub_id or "")[:19]
        raise Incompatible(f"the adapters' base is {name} ({which}): add it with `qhub base add`")
    raise Incompatible("these files do not say which base they are for: `qhub add` them with --base, then score them")


def judge(
    base: Mapping[str, Any],
    held: "Scored",
    requirements: Sequence[Requirement],
    home: Home,
    reporter: "Reporter",
    loaded: "LoadedBase | None" = None,
) -> Callable[[Path], dict[str, Any]]:
    """A function that scores an adapter's folder and returns its metrics, or raises QhubError if it falls short.

    `base` is what the merge's parents say of theirs, `loaded` the same if it is in memory. Mistakes in data and
    requirements raise here already.
    """
    check_held(held, requirements)
    info = base_for(base, home)
    from adapterhub_local.base.load import compute_dtype, load_base
    from adapterhub_local.evaluate.evaluate import entry
    from adapterhub_local.rows.examples import read_chats

    for path in held.data.values():
        read_chats(path, held.limit)

    def work(folder: Path) -> dict[str, Any]:
        scores = open_bench(loaded or load_base(info, dtype=compute_dtype()), held).score(folder, reporter)
        check_scores(scores, requirements, held)
        return {task: entry({"adapter": score}, digest_file(held.data[task])) for task, score in scores.items()}

    return work


def check_scores(scores: Mapping[str, "Score"], requirements: Sequence[Requirement], held: "Scored") -> None:
    """Raises QhubError naming every figure that falls short."""
    failed = []
    for requirement in requirements:
        score = scores[requirement.task]
        value = getattr(score, requirement.metric)
        if not requirement.bound.holds(value):
            where = f"{counted(score.rows, 'example')} of {held.data[requirement.task].name}"
            failed.append(
                f"{requirement.task}.{requirement.metric} is {value:.4g} on {where}, but {requirement} is required"
            )
    if failed:
        raise QhubError(f"not kept, a skill is lost: {'; '.join(failed)}")
