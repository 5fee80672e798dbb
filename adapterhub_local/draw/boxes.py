"""A graph without cycles as boxes in layers, parents above: inline SVG whose boxes are links where there is one.

Layers by longest path, order within them by the mean place of the neighbours (barycentre, Sugiyama et al. 1981).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from adapterhub_local.visible import visible_line

BOX_WIDTH, BOX_HEIGHT, GAP, LAYER, EDGE = 216, 44, 18, 92, 4  # pixels
SWEEPS = 4
LABEL, DETAIL = 15.0, 17.5  # widths of a box in the size of its label and of its detail
_NARROW, _BROAD = frozenset("fijlrt.,:;'|!()[] "), frozenset("mwMW@%&—…")


@dataclass(frozen=True)
class Box:
    """A node: what is written in it, and where it leads."""

    id: str
    label: str
    detail: str = ""
    link: str | None = None
    is_chosen: bool = False


@dataclass(frozen=True)
class Arrow:
    """From a parent to its child, with what is written at it."""

    source: str
    target: str
    label: str = ""


def boxes(nodes: Sequence[Box], arrows: Sequence[Arrow]) -> str:
    """The picture. Arrows that close a circle are drawn, and do not count for the layers."""
    layers = _ordered(_layers(nodes, arrows), arrows)
    widest = max((len(layer) for layer in layers), default=1)
    width = widest * (BOX_WIDTH + GAP) - GAP + 2 * EDGE
    height = (len(layers) - 1) * LAYER + BOX_HEIGHT + 2 * EDGE
    places: dict[str, tuple[float, float]] = {}
    for number, layer in enumerate(layers):
        start = (width - (len(layer) * (BOX_WIDTH + GAP) - GAP)) / 2
        for place, name in enumerate(layer):
            places[name] = (start + place * (BOX_WIDTH + GAP), EDGE + number * LAYER)
    parts = [
        (
            f'<svg class="graph" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="group"'
            ' aria-label="What this was made of">'
        )
    ]
    for arrow in arrows:
        parts.append(_arrow(arrow, places))
    parts += [_box(node, *places[node.id]) for node in nodes]
    return "".join([*parts, "</svg>"])


def _layers(nodes: Sequence[Box], arrows: Sequence[Arrow]) -> list[list[str]]:
    """The ids by layer: a node lies below all its parents."""
    children: dict[str, list[str]] = {node.id: [] for node in nodes}
    waiting = dict.fromkeys(children, 0)
    for arrow in arrows:
        children[arrow.source].append(arrow.target)
        waiting[arrow.target] += 1
    depth = dict.fromkeys(children, 0)
    ready = [name for name, count in waiting.items() if not count]
    for name in ready:  # grows while it is walked
        for child in children[name]:
            depth[child] = max(depth[child], depth[name] + 1)
            waiting[child] -= 1
            if not waiting[child]:
                ready.append(child)
    for name in reversed(ready):  # sources as near to their children as may be
        if below := [depth[child] for child in children[name]]:
            depth[name] = max(depth[name], min(below) - 1)
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=0) + 1)]
    for name, level in depth.items():
        layers[level].append(name)
    return [layer for layer in layers if layer]


def _ordered(layers: list[list[str]], arrows: Sequence[Arrow]) -> list[list[str]]:
    """The same layers, with fewer crossings."""
    near: dict[str, list[str]] = {name: [] for layer in layers for name in layer}
    for arrow in arrows:
        near[arrow.source].append(arrow.target)
        near[arrow.target].append(arrow.source)
    for sweep in range(SWEEPS):
        place = {name: index / max(1, len(layer) - 1) for layer in layers for index, name in enumerate(layer)}
        for layer in layers if sweep % 2 else reversed(layers):
            means: Mapping[str, float] = {
                name: sum(place[other] for other in near[name]) / len(near[name]) if near[name] else 0.5
                for name in layer
            }
            layer.sort(key=lambda name: means[name])
            place |= {name: index / max(1, len(layer) - 1) for index, name in enumerate(layer)}
    return layers


def _arrow(arrow: Arrow, places: Mapping[str, tuple[float, float]]) -> str:
    (x, y), (to_x, to_y) = places[arrow.source], places[arrow.target]
    x, y, to_x = x + BOX_WIDTH / 2, y + BOX_HEIGHT, to_x + BOX_WIDTH / 2
    middle = (y + to_y) / 2
    drawn = (
        f'<path class="edge" d="M{x:.1f} {y:.1f}C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"/>'
    )
    if arrow.label:
        label = escape(visible_line(arrow.label))
        drawn += f'<text class="weight" x="{(x + to_x) / 2 + 5:.1f}" y="{middle + 4:.1f}">{label}</text>'
    return drawn


def _box(node: Box, x: float, y: float) -> str:
    label, detail = visible_line(node.label), visible_line(node.detail)
    whole = escape(f"{label} ({detail})" if detail else label)
    text = (
        f"<title>{whole}</title>"
        f'<rect class="box{" chosen" if node.is_chosen else ""}" x="{x:.1f}" y="{y:.1f}" width="{BOX_WIDTH}"'
        f' height="{BOX_HEIGHT}" rx="6"/>'
        f'<text x="{x + 10:.1f}" y="{y + 18:.1f}">{escape(_short(label, LABEL))}</text>'
        f'<text class="detail" x="{x + 10:.1f}" y="{y + 35:.1f}">{escape(_short(detail, DETAIL))}</text>'
    )
    if node.link is None:
        return f"<g>{text}</g>"
    return f'<a href="{escape(node.link, quote=True)}">{text}</a>'


def _short(text: str, widest: float) -> str:
    """`text`, cut where it would leave its box in any font that a page may be shown in."""
    width = 0.0
    for index, letter in enumerate(text):
        width += _width(letter)
        if width > widest:
            return f"{text[: max(1, index - 1)]}…"
    return text


def _width(letter: str) -> float:
    """About how wide a letter is, in the size of its font."""
    if letter in _NARROW:
        return 0.42
    if letter in _BROAD or not letter.isascii():
        return 1.05
    return 0.74 if letter.isupper() else 0.64
