"""Registries that nobody would make on purpose: texts that turn letters round, and more of everything than fits."""

from typing import Any

from adapterhub_local.registry import Registry
from tests.stores import LINEAGE, files

# an override of direction, Hebrew, controls, a byte order mark, half a character, the end of a script, a template
TURNED = "\u202e\u2066\u200e\u05e9\u05dc\u05d5\u05dd\x1b[31m\x07\x00\u2028\ufeff\ud800"
TEXT = f"{TURNED}</script><img src=x onerror=alert(1)>{{{{ 7*7 }}}}<b>"
LONG = TEXT + "W" * 1_000_000
UNSEEN = (
    *map(chr, range(0x202A, 0x202F)),
    *map(chr, range(0x2066, 0x206A)),
    "\u200e",
    "\u200f",
    "\x1b",
    "\x07",
    "\ufeff",
)


def scores(text: str = "") -> dict[str, Any]:
    """Scores with intervals, the base's beside and what lies between."""
    base = {"exact_match": 0.2, "rows": 200, "intervals": {"exact_match": [0.15, 0.25]}}
    base["difference"] = {"exact_match": {"value": 0.62, "interval": [0.55, 0.7], "is_clear": True}}
    ours = {"exact_match": 0.82, "loss": 0.4, "rows": 200, "intervals": {"exact_match": [0.77, 0.86]}}
    return {"adapter": ours | ({text: 0.5} if text else {}), "base": base}


def hostile_lineage(text: str) -> dict[str, Any]:
    """The text in every field that a page shows."""
    return {
        "kind": text, "task": text, "description": text,
        "base": {"name": text, "hub_id": text, "fingerprint": "sha256:" + "1" * 64},
        "adapter": {"rank": text, "alpha": 4.0},
        "merge": {"method": text},
        "recipe": {"text": text, "resolved": {text: text}},
        "data": [{"role": text, "file": text, "rows": text, "digest": text}],
        "parents": [{"reference": text, "weight": 1.0, "content_digest": text}],
        "training": {"steps": text, "curve": [[1, 2.0], [2, 1.0], [text, text], [3, 10**400]]},
        "samples": [dict.fromkeys(("prompt", "wanted", "base", "adapter"), text)],
        "notes": [text],
        "metrics": {text: scores(text)},
    }  # fmt: skip


def publish_hostile(registry: Registry, name: str, text: str) -> None:
    """Two versions of a name with the text everywhere, and in a tag that got past the registry's checks."""
    for seed in (1, 2):
        registry.publish(name, files(seed), hostile_lineage(text + str(seed)), alias="prod")
    with registry.database.writing() as db:
        tag = text.encode("utf-8", "replace").decode()[:300]
        db.execute("INSERT INTO tags (name, number, tag) VALUES (?, 2, ?)", (name, tag))


def many_tasks(count: int) -> dict[str, Any]:
    """A lineage with scores of so many tasks."""
    return LINEAGE | {"metrics": {f"task-number-{index}": scores() for index in range(count)}}
