"""The form of a lineage from elsewhere: what is read later must be what it is read as. More may be in it.

What is shown has no control characters: a terminal would obey them.
"""

import math
from typing import Any

NUMBER = (int, float)
_OPTIONAL: dict[str, dict[str, Any]] = {  # may be absent or null
    "base": dict.fromkeys(("name", "fingerprint", "hub_id", "revision", "architecture"), str),
    "adapter": dict.fromkeys(("rank", "alpha", "num_parameters", "num_modules", "tokens"), NUMBER),
    "merge": {"method": str},
    "recipe": {},
    "imported_from": {"reference": str, "manifest_digest": str},
    "pulled_from": {"repo_id": str, "commit": str, "manifest_digest": str},
    "compatibility": {"level": str, "base_fingerprint": str, "base_model": str},
}
_REQUIRED: dict[str, dict[str, Any]] = {  # of every entry of a list
    "parents": {"reference": str, "weight": NUMBER},
    "data": {"role": str, "file": str, "rows": NUMBER, "digest": str},
}
_COMPARED = ("difference", "win_rate")  # an adapter's, beside the scores of what it was compared with
_DIGESTS = ("manifest_digest", "content_digest", "digest")


def check_lineage(lineage: Any) -> None:
    """Raise ValueError naming the part of a lineage that has another form than it is read in."""
    _require(isinstance(lineage, dict), "it")
    for key in ("kind", "task", "description"):
        _require(lineage.get(key) is None or _is(lineage[key], str), key)
    for key, fields in _OPTIONAL.items():
        table = lineage.get(key, {})
        _require(isinstance(table, dict), key)
        for name, kind in fields.items():
            is_absent = name not in table or (table[name] is None and kind is str)
            _require(is_absent or _is(table[name], kind), f"{key}.{name}")
    for key, fields in _REQUIRED.items():
        entries = lineage.get(key, [])
        _require(isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries), key)
        for entry in entries:
            for name, kind in fields.items():
                _require(_is(entry.get(name), kind), f"{key}.{name}")
            weights = entry.get("weights", [])  # of a parent, one for each group of layers
            _require(isinstance(weights, list) and all(_is(one, NUMBER) for one in weights), f"{key}.weights")
            for name in _DIGESTS:
                _require(entry.get(name) is None or _is(entry[name], str), f"{key}.{name}")
    check_metrics(lineage.get("metrics", {}))


def check_metrics(metrics: Any) -> None:
    """task -> who (adapter, base) -> metric -> number; beside the numbers `intervals`: metric -> [low, high]."""
    _require(isinstance(metrics, dict) and all(isinstance(task, dict) for task in metrics.values()), "metrics")
    for task, scored in metrics.items():
        for who, scores in scored.items():
            _require(_is_plain(task) and _is_plain(who), f"metrics.{task}.{who}")
            where = f"metrics.{task}.{who}"
            if who in ("adapter", "base"):
                _require(isinstance(scores, dict), where)
            if not isinstance(scores, dict):
                continue
            intervals = scores.get("intervals") or {}
            _require(isinstance(intervals, dict), f"{where}.intervals")
            for name, value in scores.items():
                _require(_is_plain(name), f"{where}.{name}")
                is_score = value is None or _is(value, (*NUMBER, str))
                _require(name in ("intervals", *_COMPARED) or is_score, f"{where}.{name}")
            _check_compared(scores, where)
            for name, pair in intervals.items():
                _require(_is_pair(pair), f"{where}.intervals.{name}")


def _check_compared(scores: dict[str, Any], where: str) -> None:
    """What the adapter has over another: `difference`, metric -> value, and `win_rate`, a value, with intervals."""
    _require(isinstance(scores.get("difference", {}), dict), f"{where}.difference")
    found = {f"{where}.difference.{name}": value for name, value in scores.get("difference", {}).items()}
    if "win_rate" in scores and not _is(scores["win_rate"], NUMBER):
        found[f"{where}.win_rate"] = scores["win_rate"]
    for place, value in found.items():
        _require(isinstance(value, dict) and _is(value.get("value"), NUMBER) and _is_plain(place), place)
        _require(_is_pair(value.get("interval")) and value.keys() <= {"value", "interval", "is_clear"}, place)
        _require(isinstance(value.get("is_clear", False), bool), place)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is(bound, NUMBER) for bound in value)


def _is(value: Any, kind: Any) -> bool:
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    if isinstance(value, NUMBER):  # neither the database nor a float holds every whole number that JSON does
        return abs(value) < 2**63 or (isinstance(value, float) and math.isfinite(value))
    return type(value) is not str or _is_plain(value)


def _is_plain(text: str) -> bool:
    return not any(ord(letter) < 32 or 127 <= ord(letter) < 160 or 0xD800 <= ord(letter) < 0xE000 for letter in text)


def _require(holds: bool, where: str) -> None:
    if not holds:
        shown = where.encode("unicode_escape").decode()[:80]
        raise ValueError(f"its lineage has another form: {shown} is not what it should be")
