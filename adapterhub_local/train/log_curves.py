"""The curves of a run's log: its panels for a picture, as text for a terminal, and short for a lineage."""

from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_local.draw.curve import RATE, Curve, Panel, loss_panel, svg

MAX_POINTS = 200  # of a curve that is kept in a lineage
Points = list[tuple[float, float]]


def points(entries: Sequence[Mapping[str, Any]], key: str) -> Points:
    """(step, value) of the entries that have this key."""
    return [(entry["step"], float(entry[key])) for entry in entries if isinstance(entry.get(key), int | float)]


def panels(entries: Sequence[Mapping[str, Any]]) -> tuple[Panel, Panel]:
    """Loss, training and held-out, above learning rate."""
    rate = Curve(points(entries, "learning_rate"), RATE)
    return loss_panel(points(entries, "loss"), points(entries, "eval_loss")), Panel("learning rate", (rate,))


def draw(entries: Sequence[Mapping[str, Any]], title: str) -> str:
    """An SVG of a run."""
    return svg(panels(entries), title)


def terminal_plot(entries: Sequence[Mapping[str, Any]], width: int = 72, height: int = 14) -> str:
    """The losses over steps as lines of text: · for training, o for held-out."""
    curves = ((points(entries, "loss"), "·"), (points(entries, "eval_loss"), "o"))
    every = [point for curve, _ in curves for point in curve]
    if not every:
        return "no step has been made"
    last, high, low = max(x for x, _ in every), max(y for _, y in every), min(y for _, y in every)
    span = (high - low) or 1.0
    grid = [[" "] * width for _ in range(height)]
    for curve, mark in curves:
        for step, value in curve:
            column = min(width - 1, round(step / last * (width - 1)))
            grid[min(height - 1, round((high - value) / span * (height - 1)))][column] = mark
    labels = [f"{high:8.4f}", *[" " * 8] * (height - 2), f"{low:8.4f}"]
    lines = [f"{label} |{''.join(row).rstrip()}" for label, row in zip(labels, grid, strict=True)]
    footer = f"{'':8} +{'-' * width}"
    return "\n".join(
        [*lines, footer, f"{'':10}step {last:.0f}; · training loss" + ("  o held-out" * bool(curves[1][0]))]
    )


def short_curve(entries: Sequence[Mapping[str, Any]], key: str = "loss") -> list[list[float]]:
    """[step, loss] at most MAX_POINTS times, each the mean of the steps it stands for, to be kept in a lineage.

    `key` is what else the log may have: eval_loss, learning_rate.
    """
    losses = points(entries, key)
    width = -(-len(losses) // MAX_POINTS) or 1
    groups = [losses[start : start + width] for start in range(0, len(losses), width)]
    return [[group[-1][0], _rounded(sum(loss for _, loss in group) / len(group))] for group in groups]


def _rounded(value: float) -> float:
    """To five places, or as many digits where it is small, as learning rates are."""
    return round(value, 5) if abs(value) >= 0.1 else float(f"{value:.5g}")
