"""What templates show: scores with bars, curves, graphs and tables, made of what the library returns.

All of it may come from elsewhere: numbers are taken as numbers only if they are, and every text is escaped where it is
drawn (`Markup` marks what our own drawings made) or by the template.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from markupsafe import Markup

from adapterhub_local.draw.boxes import Arrow, Box, boxes
from adapterhub_local.draw.curve import HELD_OUT, RATE, TRAIN, Curve, Panel, inline_svg, loss_panel
from adapterhub_local.draw.heat_map import heat_map, merged_squares, squares
from adapterhub_local.draw.interval_bar import interval_bar
from adapterhub_local.registry.catalog import SHARES
from serve.console.texts import LINE, cut

MAX_POINTS, MAX_ARROWS, MAX_SQUARES = 250, 80, 240  # of a picture
VOTES = "blind:"  # begins the tasks whose scores are votes of people
Scored = tuple[str, str, Mapping[str, Any], Mapping[str, Any]]  # task, metric, the adapter's scores, the base's
MAIN = (*SHARES, "acc", "acc_norm")


@dataclass(frozen=True)
class ScoreRow:
    """A score of a version on a task, beside the base's."""

    task: str
    metric: str
    value: str
    interval: str
    base: str
    rows: str
    bar: Markup | None
    base_interval: str = ""
    difference: str = ""  # the adapter less the base on the same examples, with its interval
    is_clear: bool | None = None  # whether that is more than chance


def number(value: Any) -> float | None:
    """A finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # JSON has whole numbers that no float holds
        return None
    return found if math.isfinite(found) else None


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def interval_of(scores: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """The 95 % interval of a score, if one was kept."""
    pair = mapping(scores.get("intervals")).get(metric)
    if isinstance(pair, list | tuple) and len(pair) == 2 and None not in (low_high := tuple(map(number, pair))):
        return low_high  # type: ignore[return-value]
    return None


def score_text(metric: str, value: float | None) -> str:
    """`89.5 %` for a share, `0.1312` for what is none."""
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if _is_share(metric, value) else f"{value:.4g}"


def _is_share(metric: str, value: float) -> bool:
    return (metric in MAIN or metric == "win_rate") and 0 <= value <= 1


def score_rows(metrics: Mapping[str, Any]) -> list[ScoreRow]:
    """All scores by task."""
    return [score_row(*part) for part in scored(metrics)]


def scored(metrics: Mapping[str, Any], *, only_main: bool = False) -> list[Scored]:
    """What there are scores of, votes last; with `only_main` one a task: its share, or else its first."""
    found = []
    for task, entry in metrics.items():
        ours, base = mapping(mapping(entry).get("adapter")), mapping(mapping(entry).get("base"))
        names = [name for name, value in ours.items() if name != "rows" and number(value) is not None]
        names.sort(key=lambda name: (name not in (*MAIN, "win_rate"), name))
        found += [(str(task), name, ours, base) for name in (names[:1] if only_main else names)]
    return sorted(found, key=is_vote)


def is_vote(part: Scored) -> bool:
    """Whether a score says what people preferred: no measure of a task, and often of a few votes."""
    return part[0].startswith(VOTES)


def score_row(task: str, metric: str, ours: Mapping[str, Any], base: Mapping[str, Any]) -> ScoreRow:
    """A score as pages show it."""
    value, of_base, interval = number(ours[metric]), number(base.get(metric)), interval_of(ours, metric)
    assert value is not None, "it was looked at"
    task, name = cut(task, LINE), cut(metric.replace("_", " "), 80)
    shown = _range(metric, interval)
    bar = None
    if _is_share(metric, value):
        text = f"{task}, {name}: {score_text(metric, value)}"
        text += f", 95 % interval {shown}" if shown else ""
        text += f", base {score_text(metric, of_base)}" if of_base is not None else ""
        bar = Markup(interval_bar(value, interval, of_base, text))  # noqa: S704 - it escapes its text
    rows = number(ours.get("rows"))
    difference, is_clear = _difference(metric, mapping(mapping(base.get("difference")).get(metric)))
    return ScoreRow(
        task, name, score_text(metric, value), shown, score_text(metric, of_base), f"{rows:g}" if rows else "", bar,
        _range(metric, interval_of(base, metric)), difference, is_clear,
    )  # fmt: skip


def _range(metric: str, interval: tuple[float, float] | None) -> str:
    return f"{score_text(metric, interval[0])} to {score_text(metric, interval[1])}" if interval else ""


def _difference(metric: str, found: Mapping[str, Any]) -> tuple[str, bool | None]:
    """What `qhub eval --against base` keeps beside the base's scores, in points for a share."""
    value, interval = number(found.get("value")), interval_of({"intervals": {metric: found.get("interval")}}, metric)
    if value is None or interval is None:
        return "", None
    numbers = [f"{100 * one:+.1f}" if metric in MAIN else f"{one:+.4g}" for one in (value, *interval)]
    is_clear = found.get("is_clear")
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]", is_clear if isinstance(is_clear, bool) else None


def metric_over_versions(versions: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The main score of every task over the versions of one name, the oldest first; None where there are not two."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    bases: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for version in reversed(versions):
        for task, entry in mapping(version["metrics"]).items():
            ours, base = mapping(mapping(entry).get("adapter")), mapping(mapping(entry).get("base"))
            metric = next((name for name in MAIN if number(ours.get(name)) is not None), None)
            if metric is None or str(task).startswith(VOTES) or not _is_share(metric, float(ours[metric])):
                continue
            lines.setdefault((task, metric), []).append((version["version"], float(ours[metric])))
            if (low := number(base.get(metric))) is not None:
                bases.setdefault((task, metric), []).append((version["version"], low))
    colours = (TRAIN, HELD_OUT, RATE)
    panels = [
        Panel(
            cut(f"{task}, {metric.replace('_', ' ')}", 80),
            (
                Curve(points, colours[index % 3], "adapter", 2.5),
                Curve(bases.get((task, metric), []), "#888888", "base"),
            ),
            "version",
        )
        for index, ((task, metric), points) in enumerate(list(lines.items())[:4])
        if len(points) > 1
    ]
    return Markup(inline_svg(panels, "Scores over versions")) if panels else None  # noqa: S704 - it escapes


def points(value: Any) -> list[tuple[float, float]]:
    """[step, value] pairs of a lineage, as far as they are numbers."""
    pairs = value if isinstance(value, list) else []
    found = [(number(pair[0]), number(pair[1])) for pair in pairs if isinstance(pair, list) and len(pair) >= 2]
    kept = [(x, y) for x, y in found if x is not None and y is not None]
    step = math.ceil(len(kept) / MAX_POINTS) or 1  # the last is among them
    return kept[(len(kept) - 1) % step :: step]


def training_curve(training: Mapping[str, Any], title: str) -> Markup | None:
    """The losses and the learning rate that a lineage keeps."""
    loss, held_out = points(training.get("curve")), points(training.get("held_out"))
    rate = points(training.get("learning_rate"))
    return curve(loss, held_out, rate, title)


def curve(loss: Sequence[Any], held_out: Sequence[Any], rate: Sequence[Any], title: str) -> Markup | None:
    """Loss, training and held-out, above the learning rate, as far as they are there."""
    if not (loss or held_out):
        return None
    panels = [loss_panel(loss, held_out)]
    if rate:
        panels.append(Panel("learning rate", (Curve(rate, RATE),)))
    return Markup(inline_svg(panels, title))  # noqa: S704 - it escapes


def lineage_graph(graph: Mapping[str, Any], most: int) -> tuple[Markup, int]:
    """A lineage as boxes, each version a link to its page; the nearest `most`, and how many are left out."""
    nearest = graph["nodes"][:most]
    nodes = [
        Box(
            node["id"], cut(node["label"], LINE), cut(node["detail"], LINE),
            version_link(node["reference"]) if node["reference"] else None, node["depth"] == 0,
        )
        for node in nearest
    ]  # fmt: skip
    drawn = {node["id"] for node in nearest}
    arrows = [
        Arrow(edge["from"], edge["to"], f"{weight:g}" if (weight := number(edge["weight"])) is not None else "")
        for edge in graph["edges"]
        if edge["from"] in drawn and edge["to"] in drawn
    ]
    picture = Markup(boxes(nodes, arrows[: max(most, MAX_ARROWS)]))  # noqa: S704 - it escapes
    return picture, len(graph["nodes"]) - len(nodes)


def cosines(modules: Iterable[Mapping[str, Any]], description: str, most: int = MAX_SQUARES) -> Markup | None:
    """The cosines of a comparison, or of a merge of two, by module and layer; of many modules by groups of layers."""
    values: dict[str, float | None] = {}
    for module in modules:
        cosine = module.get("cosine")
        value = cosine[0] if isinstance(cosine, list) and cosine else cosine
        values[cut(module.get("module"), LINE)] = number(value)
    if not values:
        return None
    shown, explained = (squares(values), "") if len(values) <= most else merged_squares(values, most)
    picture = Markup(heat_map(shown, description))  # noqa: S704 - it escapes
    return picture + Markup('<p class="hint">{}</p>').format(explained) if explained else picture


def version_link(reference: str) -> str:
    """The page of a version: the adapter's, with that version in sight."""
    name, _, version = reference.partition("@")
    version = f"?v={quote(version, errors='replace')}" if version else ""
    return f"/console/adapters/{quote(name, errors='replace')}{version}"


def with_query(path: str, **changes: Any) -> str:
    """A path with what is asked for; what is empty is left out."""
    pairs = [(name, value) for name, value in changes.items() if value not in (None, "", [], ())]
    return f"{path}?{urlencode(pairs, doseq=True, errors='replace')}" if pairs else path


def size_text(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def duration_text(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count_text(value: Any) -> str:
    """A number from elsewhere, nothing for what is none."""
    found = number(value)
    return "" if found is None else f"{found:,.0f}" if found == int(found) and abs(found) < 1e15 else f"{found:.4g}"


def time_text(stamp: Any) -> str:
    """A time of ours to the minute."""
    return str(stamp or "")[:16].replace("T", " ")
