"""The curves of a run's log: as SVG for a page, as text for a terminal. Knows the log's lines and nothing else."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, GAP = 860, 220, 64, 34, 56  # pixels
TRAIN, HELD_OUT, RATE, INK = "#2f6f8f", "#b4472f", "#5b7f3a", "#333333"
Points = list[tuple[float, float]]


def points(entries: Sequence[Mapping[str, Any]], key: str) -> Points:
    """(step, value) of the entries that have this key."""
    return [(entry["step"], float(entry[key])) for entry in entries if isinstance(entry.get(key), int | float)]


def draw(entries: Sequence[Mapping[str, Any]], title: str) -> str:
    """An SVG of loss (training and held-out) above learning rate, over steps."""
    panels = (
        ("loss", [(points(entries, "loss"), TRAIN, "training"), (points(entries, "eval_loss"), HELD_OUT, "held-out")]),
        ("learning rate", [(points(entries, "learning_rate"), RATE, "")]),
    )
    height = TOP + len(panels) * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/><style>text {{ font-family: sans-serif }}</style>',
        f'<text x="{LEFT}" y="18" font-size="15" fill="{INK}">{escape(title)}</text>',
    ]
    for number, (label, curves) in enumerate(panels):
        parts += _panel(label, curves, TOP + 14 + number * (HEIGHT + GAP))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(label: str, curves: list[tuple[Points, str, str]], top: int) -> list[str]:
    every = [point for curve, _, _ in curves for point in curve]
    if not every:
        return []
    last = max(step for step, _ in every)
    high = max(value for _, value in every) or 1.0
    bottom, width = top + HEIGHT, WIDTH - LEFT - 12

    def at(point: tuple[float, float]) -> str:
        return f"{LEFT + point[0] / last * width:.1f} {bottom - point[1] / high * HEIGHT:.1f}"

    parts = [
        f'<path d="M{LEFT} {top}V{bottom}H{WIDTH - 12}" fill="none" stroke="{INK}"/>',
        f'<text x="{LEFT - 6}" y="{top + 10}" text-anchor="end" fill="{INK}">{high:.3g}</text>',
        f'<text x="{LEFT - 6}" y="{bottom}" text-anchor="end" fill="{INK}">0</text>',
        f'<text x="{WIDTH - 12}" y="{bottom + 16}" text-anchor="end" fill="{INK}">step {last:.0f}</text>',
        f'<text x="{LEFT}" y="{top - 6}" fill="{INK}">{label}</text>',
    ]
    for number, (curve, colour, name) in enumerate(curves):
        if not curve:
            continue
        told = f"{name or label}: {curve[0][1]:.4g} to {curve[-1][1]:.4g}"
        path = "M" + "L".join(at(point) for point in curve)
        parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"><title>{escape(told)}</title></path>'
        )
        if name:
            x = LEFT + 60 + 110 * number
            parts.append(f'<text x="{x}" y="{top - 6}" fill="{colour}">— {name}</text>')
        if len(curve) < 40:
            parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in map(str.split, map(at, curve))]
    return parts


def plot(entries: Sequence[Mapping[str, Any]], width: int = 72, height: int = 14) -> str:
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
