"""A merge plan written as TOML, which `merge.plan_file` reads back as the same merge."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.layers import Weight
from adapterhub_local.sizes import write_size


def plan_text(
    labels: Sequence[str],
    weights: Sequence[Weight],
    alphas: Sequence[float | None],
    formula: Formula,
    others: Mapping[str, Any],
    remark: str = "",
) -> str:
    """The plan's text. `others` are keys of [merge] beside the formula's, left out where None or False."""
    rule = formula.rule
    kept: dict[str, Any] = {}
    if rule.kind in ("exact", "lossless"):
        kept["rank"] = rule.kind
    elif rule.kind == "rank":
        kept["rank"] = int(rule.value)
    elif rule.kind == "size":
        kept["max_size"] = write_size(int(rule.value))
    elif rule.kind != "auto":
        kept[rule.kind] = rule.value
    merge = {
        "method": formula.method,
        **formula.given,
        "space": formula.space,
        **kept,
        "dtype": formula.dtype if formula.dtype != "auto" else None,
        "compact": formula.compact or None,
        **others,
    }
    lines = [f"# {line}" if line else "#" for line in remark.splitlines()]
    lines += ["", "[merge]", *_entries(merge)]
    for label, weight, alpha in zip(labels, weights, alphas, strict=True):
        lines += ["", "[[adapter]]", *_entries({"reference": label, "weight": weight, "alpha": alpha})]
    return "\n".join(lines).lstrip() + "\n"


def _entries(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in table.items() if value is not None and value is not False]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(_value(one) for one in value)}]"
    assert math.isfinite(value), "checked when it was read"
    return repr(value)
