"""Cosines from -1 to 1 as a table of coloured squares, layers across, kinds of modules down: inline SVG."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from adapterhub_local.visible import visible_line

CELL, LEFT, TOP = 18, 150, 22  # pixels
STEPS = 9  # squares of the legend
MAX_TITLE = 160  # letters
_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Square:
    """A place in the picture: the kind of module, the (first) layer, what it stands for and its cosine."""

    kind: str
    layer: int
    title: str
    value: float | None


def place_of(module: str) -> tuple[str, int]:
    """The kind and the layer of a module: `model.layers.3.mlp.up_proj` is ('mlp.up_proj', 3)."""
    match = _LAYER.match(module)
    return (match[3], int(match[2])) if match and len(match[2]) < 5 else (module, 0)


def colour(value: float) -> str:
    """Blue for the opposite direction, grey for none in common, red for the same."""
    share = max(-1.0, min(1.0, value))
    end = (178, 64, 40) if share > 0 else (38, 96, 168)
    mixed = (round(208 + (part - 208) * abs(share)) for part in end)
    return "#" + "".join(f"{part:02x}" for part in mixed)


def squares(values: Mapping[str, float | None]) -> list[Square]:
    """A square for each module."""
    return [Square(*place_of(module), f"{module}: {_figure(value)}", value) for module, value in values.items()]


def merged_squares(values: Mapping[str, float | None], most: int) -> tuple[list[Square], str]:
    """At most this many squares, each the mean of modules of several layers, and what they are, in words.

    Modules that differ in a further number, such as that of an expert, are of one kind. Where there are more kinds than
    squares, those are shown with the lowest cosines.
    """
    found: dict[str, dict[int, list[float | None]]] = {}
    for module, value in values.items():
        kind, layer = place_of(module)
        found.setdefault(_NUMBER.sub("*", f".{kind}")[1:], {}).setdefault(layer, []).append(value)
    kinds = sorted(found, key=lambda kind: min(_known(found[kind].values()), default=2.0))[:most]
    layers = sorted({layer for kind in kinds for layer in found[kind]})
    size = math.ceil(len(layers) / max(1, most // len(kinds)))
    made = []
    for kind in (kind for kind in found if kind in set(kinds)):
        for start in range(0, len(layers), size):
            group = [layer for layer in layers[start : start + size] if layer in found[kind]]
            known = _known(found[kind][layer] for layer in group)
            if group:
                made.append(_merged(kind, layers[start], group, known))
    explained = f"Each square is the mean of up to {size} layers" if size > 1 else "Each square is the mean of a layer"
    if len(kinds) < len(found):
        explained += f", and of {len(found):,} kinds of modules the {len(kinds):,} with the lowest cosines are shown"
    return made, f"{explained}."


def _merged(kind: str, first: int, group: Sequence[int], known: Sequence[float]) -> Square:
    mean = sum(known) / len(known) if known else None
    where = f"layer {group[0]}" if len(group) == 1 else f"layers {group[0]} to {group[-1]}"
    spread = f", {min(known):+.3f} to {max(known):+.3f}" if len(known) > 1 else ""
    return Square(kind, first, f"{kind}, {where}: {_figure(mean)}{spread}", mean)


def _known(groups: Iterable[Iterable[float | None]]) -> list[float]:
    return [value for group in groups for value in group if value is not None]


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:+.3f}"


def heat_map(shown_squares: Sequence[Square], description: str) -> str:
    """The squares in their places; what has no value stays empty. `description` is for screen readers."""
    kinds = {kind: row for row, kind in enumerate(dict.fromkeys(square.kind for square in shown_squares))}
    layers = sorted({square.layer for square in shown_squares})
    column = {layer: index for index, layer in enumerate(layers)}
    below = TOP + len(kinds) * CELL + 12
    width, height = LEFT + max(len(layers), STEPS) * CELL + 4, below + 2 * CELL + 12
    shown = escape(visible_line(description), quote=True)
    parts = [
        (
            f'<svg class="heat" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
            f' aria-label="{shown}"><title>{shown}</title>'
        )
    ]
    parts += [
        f'<text x="{LEFT + index * CELL + CELL / 2:g}" y="{TOP - 7}" text-anchor="middle">{layer}</text>'
        for layer, index in column.items()
        if index % max(1, len(layers) // 16) == 0
    ]
    for kind, row in kinds.items():
        y = TOP + row * CELL + 13
        parts.append(f'<text x="{LEFT - 8}" y="{y}" text-anchor="end">{escape(visible_line(kind)[-24:])}</text>')
    for square in shown_squares:
        x, y = LEFT + column[square.layer] * CELL, TOP + kinds[square.kind] * CELL
        label = escape(visible_line(square.title[:MAX_TITLE]), quote=False)
        fill = "none" if square.value is None else colour(square.value)
        parts.append(
            f'<rect x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" fill="{fill}"><title>{label}</title></rect>'
        )
    return "".join([*parts, *_legend(below), "</svg>"])


def _legend(y: int) -> Iterator[str]:
    """What the colours mean."""
    yield f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">cosine</text>'
    for index in range(STEPS):
        value = 2 * index / (STEPS - 1) - 1
        x, size = LEFT + index * CELL, CELL - 2
        yield f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{colour(value)}"/>'
    end = LEFT + STEPS * CELL - 2
    middle = (LEFT + end) / 2
    for anchor, place, lines in (
        ("start", LEFT, ("-1", "opposite")),
        ("middle", middle, ("0", "unrelated")),
        ("end", end, ("1", "same")),
    ):
        for line, text in enumerate(lines):
            yield f'<text x="{place:g}" y="{y + CELL + 11 + 13 * line}" text-anchor="{anchor}">{text}</text>'
