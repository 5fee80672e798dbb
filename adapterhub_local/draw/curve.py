"""Curves over steps as a picture: SVG, or the same as PNG by Pillow. Knows points and panels, not where they come from.

Every value in a picture is a number or escaped text, so a lineage from elsewhere can smuggle nothing in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

from adapterhub_local.durable import check_absent, place_file, staging
from adapterhub_local.errors import InputError
from adapterhub_local.visible import visible_line

WIDTH, HEIGHT, LEFT, RIGHT, TOP, GAP = 860, 220, 64, 16, 48, 56  # pixels
TRAIN, FAINT, HELD_OUT, RATE, INK, GRID = "#2f6f8f", "#b9d3df", "#b4472f", "#5b7f3a", "#333333", "#dddddd"
SMOOTH = 0.8  # share of the running mean that is kept at each step
SHARPER = 2  # pixels of a PNG for one of the SVG
Points = Sequence[tuple[float, float]]  # (step, value)


@dataclass(frozen=True)
class Curve:
    """One line of a panel, and what it is called above it, if anything."""

    points: Points
    colour: str
    name: str = ""
    width: float = 1.5


@dataclass(frozen=True)
class Panel:
    """Curves over one pair of axes, the upward one from 0."""

    label: str
    curves: tuple[Curve, ...]
    across: str = "step"  # what is counted to the right


@dataclass(frozen=True)
class Line:
    """A line through pixels."""

    points: Points
    colour: str
    width: float
    tooltip: str = ""  # shown to a reader who points at it


@dataclass(frozen=True)
class Words:
    """Text beginning, or ending, at a pixel of its base line."""

    x: float
    y: float
    text: str
    colour: str = INK
    is_end: bool = False
    size: int = 12


def loss_panel(training: Points, held_out: Points = ()) -> Panel:
    """The training loss as it is and as its running mean, and the loss on held-out examples."""
    smooth, mean = [], training[0][1] if training else 0.0
    for step, loss in training:
        mean = SMOOTH * mean + (1 - SMOOTH) * loss
        smooth.append((step, mean))
    curves = (Curve(training, FAINT), Curve(smooth, TRAIN, "training", 2), Curve(held_out, HELD_OUT, "held-out", 2))
    return Panel("loss, nats per answer token", curves)


def svg(panels: Sequence[Panel], title: str) -> str:
    """The picture as SVG."""
    shapes, height = _lay_out(panels, title)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/><style>text {{ font-family: sans-serif }}</style>'
    )
    return _drawn(head, shapes)


def inline_svg(panels: Sequence[Panel], title: str) -> str:
    """The picture as a part of a page: its background, font and ink are the page's, dark or light."""
    shapes, height = _lay_out(panels, title)
    shown = escape(visible_line(title), quote=True)
    head = f'<svg class="curve" viewBox="0 0 {WIDTH} {height}" font-size="12" role="img" aria-label="{shown}">'
    drawn = _drawn(head, shapes)
    return drawn.replace(f'fill="{INK}"', 'fill="currentColor"').replace(f'stroke="{GRID}"', 'class="grid"')


def _drawn(head: str, shapes: Sequence[Line | Words]) -> str:
    parts = [head]
    for shape in shapes:
        if isinstance(shape, Words):
            anchor = ' text-anchor="end"' if shape.is_end else ""
            place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size}" fill="{shape.colour}"{anchor}'
            parts.append(f"<text {place}>{escape(visible_line(shape.text))}</text>")
        elif shape.tooltip:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
            look = f'fill="none" stroke="{shape.colour}" stroke-width="{shape.width:g}"'
            parts.append(
                f'<polyline points="{path}" {look}><title>{escape(visible_line(shape.tooltip))}</title></polyline>'
            )
        else:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in shape.points)
            parts.append(f'<path d="M{path}" fill="none" stroke="{shape.colour}" stroke-width="{shape.width:g}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def png(panels: Sequence[Panel], title: str) -> bytes:
    """The picture as PNG, twice as large. Raises InputError without the package Pillow."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise InputError("PNG needs the package Pillow: pip install pillow, or name a file that ends in .svg") from None
    shapes, height = _lay_out(panels, title)
    scale = 2 * SHARPER  # drawn twice as large and shrunk, which smooths the edges
    image = Image.new("RGB", (WIDTH * scale, height * scale), "white")
    draw = ImageDraw.Draw(image)
    for shape in shapes:
        if isinstance(shape, Words):
            font = ImageFont.load_default(shape.size * scale)
            place = (shape.x * scale, shape.y * scale)
            draw.text(place, shape.text, shape.colour, font, anchor="rs" if shape.is_end else "ls")
        else:
            path = [(x * scale, y * scale) for x, y in shape.points]
            draw.line(path, shape.colour, round(shape.width * scale), joint="curve")
    buffer = BytesIO()
    image.resize((WIDTH * SHARPER, height * SHARPER), Image.Resampling.LANCZOS).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_picture(panels: Sequence[Panel], title: str, target: Path) -> None:
    """Write the picture to a .svg or .png file. Raises InputError for another name, InUse if the file exists."""
    if target.suffix not in (".svg", ".png"):
        raise InputError(f"{target} must end in .svg or .png")
    check_absent(target)
    drawn = png(panels, title) if target.suffix == ".png" else svg(panels, title).encode()
    if not target.absolute().parent.is_dir():
        raise InputError(f"{target.absolute().parent} does not exist: create the folder first")
    with staging(target.absolute().parent, prefix=".qhub-") as stage:
        (stage / target.name).write_bytes(drawn)
        place_file(stage / target.name, target)


def _lay_out(panels: Sequence[Panel], title: str) -> tuple[list[Line | Words], int]:
    """What is drawn, and the height of the picture in pixels; panels without a point are left out."""
    shapes: list[Line | Words] = [Words(LEFT, 22, title, size=15)]
    top = TOP
    for panel in panels:
        curves = [
            (curve, [point for point in curve.points if all(map(math.isfinite, point))]) for curve in panel.curves
        ]
        curves = [(curve, points) for curve, points in curves if points]
        if curves:
            shapes += _panel(panel.label, panel.across, curves, top)
            top += HEIGHT + GAP
    return shapes, top


def _panel(label: str, counted: str, curves: Sequence[tuple[Curve, Points]], top: int) -> list[Line | Words]:
    steps = [step for _, points in curves for step, _ in points]
    first, last = min(steps), max(steps)
    high = max(1e-9, *(value for _, points in curves for _, value in points))
    right, bottom = WIDTH - RIGHT, top + HEIGHT

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - first) / ((last - first) or 1)
        return LEFT + across * (right - LEFT), bottom - max(0.0, point[1]) / high * HEIGHT

    shapes: list[Line | Words] = [Words(LEFT, top - 8, label)]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - share * HEIGHT
        shapes += [Line(((LEFT, y), (right, y)), GRID, 1), Words(LEFT - 6, y + 4, f"{share * high:.3g}", is_end=True)]
    shapes += [Words(LEFT, bottom + 16, f"{counted} {first:g}"), Words(right, bottom + 16, f"{last:g}", is_end=True)]
    names = [curve for curve, _ in curves if curve.name]
    for number, curve in enumerate(reversed(names)):
        shapes.append(Words(right - 70 * number, top - 8, curve.name, curve.colour, is_end=True))
    for curve, points in curves:
        tooltip = f"{curve.name or label}: {points[0][1]:.4g} to {points[-1][1]:.4g}"
        path = [at(point) for point in points]
        path = path if len(path) > 1 else [(path[0][0] - 2, path[0][1]), (path[0][0] + 2, path[0][1])]
        shapes.append(Line(path, curve.colour, curve.width, tooltip))
    return shapes
