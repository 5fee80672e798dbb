"""The model card of a pushed version: what it is, how to use it, and all the lineage says of where it came from.

A pure function of its arguments: the same version gives the same card. Every part of the lineage may be missing.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from adapterhub_local.base.quantisation import kind_called
from adapterhub_local.hub.edited import block
from adapterhub_local.hub.scores import interval
from adapterhub_local.hub.usage import usage
from adapterhub_local.registry import Version
from adapterhub_local.visible import visible, visible_line

TAGS = ["lora", "qlora", "qhub"]


def card(
    version: Version, base_id: str, repo_id: str, *,
    picture: str | None = None, licence: Mapping[str, str] | None = None, max_lora_rank: int | None = None,
) -> str:  # fmt: skip
    """The README.md of `version` in `repo_id`: YAML front matter for the Hub, then Markdown for people.

    `picture` is the file of the training curve beside it; `licence` the keys that say it (`licences.check_licence`), by
    default that of the base if it is known; `max_lora_rank` what vLLM needs, None if vLLM cannot serve the adapter.
    """
    lineage = version.lineage
    known = _text(_table(lineage.get("base")).get("license"))
    terms = dict(licence or ({"license": known} if known else {}))
    matter = _front_matter(lineage, base_id, repo_id, terms)
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, width=1000)
    sections = [
        _title(version, base_id, repo_id, terms.get("license_name") or terms.get("license")),
        usage(version, _table(lineage.get("base")), base_id, repo_id, max_lora_rank),
        _metrics(_table(lineage.get("metrics"))),
        _merge(lineage),
        _training(_table(lineage.get("training")), picture),
        _recipe(_table(lineage.get("recipe"))),
        _data(lineage.get("data")),
        _identity(version, lineage),
    ]
    return f"---\n{front}---\n\n" + block("\n\n".join(section for section in sections if section)) + "\n"


def _front_matter(lineage: Mapping[str, Any], base_id: str, repo_id: str, licence: Mapping[str, str]) -> dict[str, Any]:
    front: dict[str, Any] = {
        **licence,
        "library_name": "peft",
        "base_model": base_id,
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": [*TAGS, "merge"] if lineage.get("parents") else list(TAGS),
    }
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": str(task), "type": _slug(str(task))},
            "metrics": [
                {"type": name, "value": value, "name": name.replace("_", " ")}
                for name, value in ours.items()
                if name != "rows"
            ],
        }
        for task, scores in _table(lineage.get("metrics")).items()
        if (ours := _numbers(_table(scores).get("adapter")))
    ]
    if results:
        front["model-index"] = [{"name": repo_id.partition("/")[2], "results": results}]
    return front


def _title(version: Version, base_id: str, repo_id: str, licence: str | None) -> str:
    adapter = _table(version.lineage.get("adapter"))
    base = _table(version.lineage.get("base"))
    made = "merged from other adapters" if version.lineage.get("parents") else "a LoRA adapter"
    description = _text(version.lineage.get("description"))
    text = (
        f"# {repo_id.partition('/')[2]}\n\n"
        + (f"{_cell(description)}\n\n" if description else "")
        + (
            f"`{version}` is {made} for [{base_id}](https://huggingface.co/{base_id}), "
            f"made with adapterhub-local over the base in 4-bit {kind_called(base.get('quantisation')).title}."
        )
    )
    facts = [
        ("Task", version.lineage.get("task")),
        ("Rank", adapter.get("rank")),
        ("Alpha", adapter.get("alpha")),
        ("Parameters", f"{adapter['num_parameters']:,}" if isinstance(adapter.get("num_parameters"), int) else None),
        ("Target modules", _joined(adapter.get("target_modules"))),
        ("Tokens with rows of their own", adapter.get("tokens")),
        ("Base revision", base.get("revision")),
        ("Seed", version.lineage.get("seed")),
        ("Licence", licence),
    ]
    rows = [(key, value) for key, value in facts if value is not None]
    return text + (f"\n\n{_markdown_table(('', ''), rows)}" if rows else "")


def _metrics(metrics: Mapping[str, Any]) -> str:
    rows, has_interval = [], False
    for task, scores in metrics.items():
        kept = [_table(_table(scores).get(who)) for who in ("base", "adapter")]
        tables = [_numbers(table) for table in kept]
        count = next((table["rows"] for table in reversed(tables) if "rows" in table), _table(scores).get("rows"))
        for name in dict.fromkeys(key for table in tables for key in table if key != "rows"):
            shown = [
                _with_interval(name, table.get(name), table.get("rows", count), _table(all_.get("intervals")).get(name))
                for table, all_ in zip(tables, kept, strict=True)
            ]
            has_interval = has_interval or any("\N{EN DASH}" in text for text in shown if text)
            rows.append((task, name, *shown, count))
    if not rows:
        return ""
    head = "## Results\n\nThe base alone against the base with this adapter, on held-out rows."
    if has_interval:
        head += " In brackets: the 95 % interval for this many rows."
    return f"{head}\n\n" + _markdown_table(("Task", "Metric", "Base", "Adapter", "Rows"), rows)


def _with_interval(name: str, value: float | None, rows: Any, kept: Any) -> str | None:
    """A score with the interval that was kept with it, or Wilson's for a share of this many rows."""
    if value is None:
        return None
    ends = _list(kept) or interval(name, value, int(rows) if isinstance(rows, int | float) else None)
    if ends and not (len(ends) == 2 and all(isinstance(end, int | float) for end in ends)):
        ends = None
    return f"{value:.4g}" + (f" [{ends[0]:.3f}\N{EN DASH}{ends[1]:.3f}]" if ends else "")


def _training(training: Mapping[str, Any], picture: str | None) -> str:
    names = {"steps": "steps", "examples": "examples", "loss": "loss at the end", "optimizer": "optimizer"}
    names |= {"compute": "activations in", "seconds": "seconds", "tokens_per_second": "tokens a second"}
    rows = [(text, training[key]) for key, text in names.items() if isinstance(training.get(key), str | int | float)]
    if not rows:
        return ""
    curve = f"\n\n![Training loss]({picture})" if picture else ""
    return "## Training\n\n" + _markdown_table(("", ""), rows) + curve


def _merge(lineage: Mapping[str, Any]) -> str:
    parents = [_table(parent) for parent in _list(lineage.get("parents"))]
    if not parents:
        return ""
    rows = [(parent.get("reference"), _weight(parent), _code(parent.get("content_digest"))) for parent in parents]
    merge = _table(lineage.get("merge")).items()
    method = [f"- {key}: {_cell(f'{value:.4g}' if isinstance(value, float) else value)}" for key, value in merge]
    text = "## Merged from\n\n" + _markdown_table(("Adapter", "Weight", "Content digest"), rows)
    return text + ("\n\n" + "\n".join(method) if method else "")


def _weight(parent: Mapping[str, Any]) -> Any:
    weights = [f"{one:g}" for one in _list(parent.get("weights")) if isinstance(one, int | float)]
    return "/".join(weights) or parent.get("weight")  # of groups of layers, or of all


def _recipe(recipe: Mapping[str, Any]) -> str:
    text = recipe.get("text")
    if not isinstance(text, str) or not text.strip():
        return ""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)  # the recipe cannot end its own block
    return f"## Recipe\n\n{fence}toml\n{visible(text.strip())}\n{fence}"


def _data(data: Any) -> str:
    rows = [
        (file.get("role"), file.get("file"), file.get("rows"), _code(file.get("digest")))
        for file in map(_table, _list(data))
        if file
    ]
    return "## Data\n\n" + _markdown_table(("Role", "File", "Rows", "Digest"), rows) if rows else ""


def _identity(version: Version, lineage: Mapping[str, Any]) -> str:
    rows = [
        ("Content digest", _code(version.content_digest)),
        ("Manifest digest", _code(version.manifest_digest)),
        ("Base fingerprint", _code(_table(lineage.get("base")).get("fingerprint"))),
        ("Recipe digest", _code(_table(lineage.get("recipe")).get("digest"))),
        *((f"`{name}`", value) for name, value in _table(lineage.get("environment")).items() if isinstance(value, str)),
    ]
    return "## Provenance\n\n" + _markdown_table(("", ""), [row for row in rows if row[1]])


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)])


def _cell(value: Any) -> str:
    """`value` on one line that cannot break out of its cell."""
    text = "" if value is None else visible_line(" ".join(str(value).split()))
    return text.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


def _code(digest: Any) -> str | None:
    return f"`{digest.replace('`', '')}`" if isinstance(digest, str) and digest else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _numbers(value: Any) -> dict[str, float]:
    return {
        str(name): number
        for name, number in _table(value).items()
        if isinstance(number, int | float) and not isinstance(number, bool)
    }


def _joined(modules: Any) -> str | None:
    """The kinds of modules, `q_proj`, not each of hundreds of layers."""
    names = [modules] if isinstance(modules, str) else [str(module).rpartition(".")[2] for module in _list(modules)]
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names)) or None


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "data"
