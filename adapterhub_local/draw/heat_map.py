"""Cosines from -1 to 1 as a table of coloured squares, layers across, kinds of modules down: inline SVG."""

import re
from collections.abc import Iterator, Mapping
from html import escape

from adapterhub_local.visible import visible_line

CELL, LEFT, TOP = 18, 150, 22  # pixels
STEPS = 9  # squares of the legend
_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")


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


def heat_map(values: Mapping[str, float | None], description: str) -> str:
    """The squares of modules by name; what has no value stays empty. `description` is for screen readers."""
    kinds = list(dict.fromkeys(place_of(module)[0] for module in values))
    layers = sorted({place_of(module)[1] for module in values})
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
    for row, kind in enumerate(kinds):
        y = TOP + row * CELL + 13
        parts.append(f'<text x="{LEFT - 8}" y="{y}" text-anchor="end">{escape(visible_line(kind)[-24:])}</text>')
    for module, value in values.items():
        kind, layer = place_of(module)
        x, y = LEFT + column[layer] * CELL, TOP + kinds.index(kind) * CELL
        label = escape(f"{visible_line(module)}: {'none' if value is None else f'{value:+.3f}'}")
        fill = "none" if value is None else colour(value)
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
