"""How well a router chooses on unseen prompts: accuracy, confusion, calibration, and what it leaves to the base."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapterhub_local.bounds import Bound, split_bound
from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.intervals import wilson
from adapterhub_local.router.classifier import fit
from adapterhub_local.router.features import Embeddings
from adapterhub_local.router.files import RouterFiles
from adapterhub_local.router.router import Choice, Router, decide

BINS = 15  # of confidence
METRICS = ("accuracy", "calibration_error", "unseen")


@dataclass(frozen=True)
class Measured:
    """Of each route's held-out prompts, in the order of the routes.

    confusion   row: whose prompt it is; column: who was chosen; the last column is the base
    unseen      the share of a route's prompts that a router which never saw this adapter leaves to the base, by name;
                empty for a router of one adapter
    """

    names: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    calibration_error: float
    unseen: dict[str, float]

    @property
    def rows(self) -> int:
        return sum(map(sum, self.confusion))

    @property
    def accuracy(self) -> float:
        return sum(row[self._right(place)] for place, row in enumerate(self.confusion)) / self.rows

    def _right(self, place: int) -> int:
        """The column of the prompts of a route that are routed as they should: the base's own is the last one."""
        return place if self.names[place] != BASE_NAME else len(self.confusion[place]) - 1

    def tasks(self) -> list[dict[str, Any]]:
        """Of each route: its prompts, the share that was routed to it, and of what was routed to it the share that is
        its own."""
        found = []
        for place, (name, row) in enumerate(zip(self.names, self.confusion, strict=True)):
            column = self._right(place)
            chosen = sum(other[column] for other in self.confusion)
            found.append({
                "route": name,
                "rows": sum(row),
                "accuracy": row[column] / sum(row),
                "precision": row[column] / chosen if chosen else None,
                "to_base": row[-1] / sum(row),
                **({"unseen": self.unseen[name]} if name in self.unseen else {}),
            })  # fmt: skip
        return found

    def to_json(self) -> dict[str, Any]:
        """What a lineage keeps beside the scores."""
        return {
            "tasks": self.tasks(),
            "columns": [*(name for name in self.names if name != BASE_NAME), BASE_NAME],
            "confusion": [self._shown(row) for row in self.confusion],
        }

    def _shown(self, row: Sequence[int]) -> list[int]:
        return [count for name, count in zip(self.names, row, strict=False) if name != BASE_NAME] + [row[-1]]

    def scores(self) -> dict[str, Any]:
        """In the form in which evaluations are kept."""
        low, high = wilson(round(self.accuracy * self.rows), self.rows)
        return {
            "accuracy": self.accuracy,
            "calibration_error": self.calibration_error,
            **({"unseen": self.mean_unseen} if self.unseen else {}),
            "rows": self.rows,
            "intervals": {"accuracy": [low, high]},
        }

    @property
    def mean_unseen(self) -> float:
        return sum(self.unseen.values()) / len(self.unseen)


BASE_NAME = "base"


@dataclass(frozen=True)
class Requirement:
    """A bound on what was measured: `accuracy>=0.97`, or of one adapter `sentiment.accuracy>=0.95`."""

    adapter: str | None
    metric: str
    bound: Bound

    @classmethod
    def parse(cls, text: str) -> "Requirement":
        """The requirement that `text` spells. Raises InputError."""
        figure, bound = split_bound(text) or ("", None)
        adapter, _, metric = figure.rpartition(".")
        is_known = metric in METRICS and not (adapter and metric == "calibration_error")
        if bound is None or bound.operator == "=" or not is_known:
            shown = text.encode("unicode_escape").decode()[:80]
            raise InputError(
                f"'{shown}' is not a requirement: write a metric ({', '.join(METRICS)}) and a bound, such as "
                "'accuracy>=0.97', or of one adapter 'sentiment.accuracy>=0.95'"
            )
        return cls(adapter or None, metric, bound)

    def __str__(self) -> str:
        of = f"{self.adapter}." if self.adapter else ""
        return f"{of}{self.metric}{self.bound}"

    def value(self, measured: Measured) -> float:
        """What was measured of it. Raises InputError for an adapter that the router does not choose, or one alone."""
        if self.metric == "unseen" and not measured.unseen:
            raise InputError(f"{self} cannot be checked: a router of one adapter leaves none out")
        if self.adapter is None:
            return {"accuracy": measured.accuracy, "calibration_error": measured.calibration_error}.get(
                self.metric, measured.mean_unseen if measured.unseen else 0.0
            )
        for task in measured.tasks():
            if task["route"].partition("@")[0] == self.adapter and self.metric in task:
                return float(task[self.metric])
        raise InputError(f"{self} cannot be checked: the router does not choose '{self.adapter}'")


def check(measured: Measured, requirements: Sequence[Requirement]) -> None:
    """Raises QhubError naming every figure that falls short."""
    failed = [
        f"{requirement} is required, and it is {value:.4g}"
        for requirement in requirements
        if not requirement.bound.holds(value := requirement.value(measured))
    ]
    if failed:
        raise QhubError(f"not registered, {'; '.join(failed)} on {measured.rows} held-out prompts")


def names_of(files: RouterFiles) -> tuple[str, ...]:
    return tuple(BASE_NAME if route is None else str(route) for route in files.routes)


def choices(files: RouterFiles, features: torch.Tensor) -> list[Choice]:
    """The choice for each text's features (n, h)."""
    shares, near = files.classifier.judge(features @ files.classifier.columns)
    pairs = zip(shares.tolist(), near.tolist(), strict=True)
    return [decide(files, one, close, lambda _: True, files.threshold) for one, close in pairs]


def measure(files: RouterFiles, features: torch.Tensor, labels: torch.Tensor, unseen: dict[str, float]) -> Measured:
    """Of held-out features (n, h) and the routes they are of (n)."""
    places = {route: place for place, route in enumerate(files.routes)}
    confusion = [[0] * (len(files.routes) + 1) for _ in files.routes]
    sure: list[tuple[float, bool]] = []
    for choice, label in zip(choices(files, features), labels.tolist(), strict=True):
        is_base = choice.reference is None
        confusion[label][-1 if is_base else places[choice.reference]] += 1
        sure.append((choice.confidence, choice.reference == files.routes[label]))
    rows = tuple(map(tuple, confusion))
    return Measured(names_of(files), rows, calibration_error(sure), unseen)


def calibration_error(sure: Sequence[tuple[float, bool]]) -> float:
    """The mean distance between confidence and accuracy over bins of confidence, each by its size (ECE, Guo 2017)."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, is_right in sure:
        bins.setdefault(min(int(confidence * BINS), BINS - 1), []).append((confidence, is_right))
    gaps = (abs(sum(confidence for confidence, _ in one) - sum(right for _, right in one)) for one in bins.values())
    return sum(gaps) / len(sure)


def measure_unseen(
    files: RouterFiles, train: Sequence[torch.Tensor], held: Sequence[torch.Tensor], test: Sequence[torch.Tensor]
) -> dict[str, float]:
    """The share of each adapter's prompts that a router of all others leaves to the base, as it should."""
    found: dict[str, float] = {}
    adapters = [place for place, route in enumerate(files.routes) if route is not None]
    for place in adapters if len(adapters) > 1 else []:
        others = [other for other in range(len(files.routes)) if other != place]
        routes = tuple(files.routes[other] for other in others)
        base = routes.index(None) if None in routes else None
        classifier = fit(
            *stacked([train[other] for other in others]), *stacked([held[other] for other in others]), len(others),
            coverage=files.coverage, unbounded=base,
        )  # fmt: skip
        without = RouterFiles(routes, classifier, files.threshold, files.coverage, files.base_fingerprint)
        chosen = choices(without, test[place])
        found[str(files.routes[place])] = sum(choice.reference is None for choice in chosen) / len(chosen)
    return found


def stacked(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of several routes one behind another, and which route each is of."""
    return torch.cat(list(parts)), torch.cat([torch.full((len(part),), place) for place, part in enumerate(parts)])


def milliseconds(files: RouterFiles, embeddings: Embeddings, texts: Sequence[str]) -> float:
    """The median time of one choice, text to adapter, in this process."""
    router = Router(files, embeddings)
    times = []
    for text in texts:
        start = time.perf_counter()
        router.choose([text])
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[len(times) // 2]
