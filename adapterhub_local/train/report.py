"""The report of a run as one HTML file that needs nothing else: curves, scores, samples, recipe and lineage."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_local.counts import counted
from adapterhub_local.train.log_curves import draw
from adapterhub_local.visible import visible

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:left;"
    "vertical-align:top;white-space:pre-wrap}pre{background:#f5f5f5;padding:1em;overflow:auto}h2{margin-top:2em}"
)


def write_report(
    title: str, lineage: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, str]]
) -> str:
    """The page. `lineage` is the version's, `entries` are the lines of the run's log, `samples` those of `Sample`."""
    training, adapter = lineage["training"], lineage["adapter"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        _p(lineage.get("description")),
        _p(
            f"{counted(training['steps'], 'step')} over {counted(training['examples'], 'example')} in "
            f"{training['seconds']:.0f} s ({training['tokens_per_second']:.0f} tokens/s), "
            f"{adapter['num_parameters']:,} parameters in {counted(adapter['num_modules'], 'module')} "
            f"on {lineage['base']['name']}."
        ),
        draw(entries, f"{title}: loss and learning rate"),
    ]
    for task, scores in lineage.get("metrics", {}).items():
        names = [name for name, value in scores["adapter"].items() if isinstance(value, int | float)]
        rows = [[name, _score(scores["base"], name), _score(scores["adapter"], name)] for name in names]
        parts += [f"<h2>Held-out {escape(task)}</h2>", _table(("", "base", "adapter"), rows)]
    if samples:
        rows = [[sample[key] for key in ("prompt", "wanted", "base", "adapter")] for sample in samples]
        parts += ["<h2>Samples, before and after</h2>", _table(("prompt", "data", "base", "adapter"), rows)]
    parts += ["<h2>Data</h2>", _table(("role", "file", "rows", "digest"), [_data(entry) for entry in lineage["data"]])]
    environment = [[name, value] for name, value in lineage["environment"].items()]
    parts += ["<h2>Environment</h2>", _table(("", ""), [*environment, *_settings(training)])]
    if notes := lineage.get("notes"):
        parts += ["<h2>Notes</h2>", _table(("",), [[note] for note in notes])]
    if changes := lineage["recipe"].get("overrides"):
        parts += ["<h2>Changes to the recipe</h2>", _table(("--set",), [[change] for change in changes])]
    parts += ["<h2>Recipe</h2>", f"<pre>{escape(lineage['recipe']['text'])}</pre>"]
    return "\n".join(part for part in parts if part) + "</html>\n"


def _data(entry: Mapping[str, Any]) -> list[Any]:
    return [entry.get("role"), entry.get("file"), entry.get("rows"), str(entry.get("digest"))[:19]]


def _settings(training: Mapping[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = [[name, training[name]] for name in ("compute", "optimizer") if name in training]
    return [
        *rows,
        *([["peak memory", f"{training['peak_memory_mb']:,.0f} MB"]] if "peak_memory_mb" in training else []),
    ]


def _score(scores: Mapping[str, Any], name: str) -> Any:
    """A metric with its 95 % interval, if it has one."""
    interval = scores.get("intervals", {}).get(name)
    if interval is None or name not in scores:
        return scores.get(name)
    return f"{scores[name]:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"


def _p(text: str | None) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(_cell(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def escape(text: str) -> str:
    """Text that is neither markup nor controls the screen."""
    return html.escape(visible(text))
