"""A home with many tiny versions, as a team's registry has them: lineages, scores, tags, aliases and merges, no blobs.

What lists and pages read is all there; the files are not, since no page reads them.
"""

import random
from pathlib import Path
from typing import Any

from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.rows import insert_version
from adapterhub_local.registry.version import File

BASES = tuple(
    {"name": f"base-{number}", "hub_id": f"org/base-{number}", "fingerprint": f"sha256:{number:x}" + "b" * 63}
    for number in range(5)
)
TASKS = ("sentiment", "origin", "sql", "tone")
WORDS = ("says", "how", "a", "review", "feels", "names", "countries", "writes", "queries", "short", "polite", "plain")


def many_versions(home: Path, versions: int, names: int, *, seed: int = 0) -> Registry:
    """A registry of so many versions under so many names; `big` has 200 of them, the last made of others."""
    drawn, registry = random.Random(seed), Registry(home)
    counts: dict[str, int] = {}
    made: list[Version] = []
    big = {versions - 1, *drawn.sample(range(versions), min(199, versions // 10))}
    with registry.database.writing() as db:
        for index in range(versions):
            name = "big" if index in big else f"team/adapter-{index % (names - 1):05}"
            counts[name] = counts.get(name, 0) + 1
            is_merge = len(made) > 2 and (index == versions - 1 or index % 10 == 9)
            lineage = _lineage(drawn, index, drawn.sample(made, 2) if is_merge else [])
            made.append(_version(name, counts[name], index, lineage))
            insert_version(db, made[-1])
            if index % 9 == 0:
                db.execute("INSERT INTO tags VALUES (?, ?, ?)", (name, counts[name], f"tag-{index % 7}"))
            if index % 5 == 0:
                db.execute("INSERT OR REPLACE INTO aliases VALUES (?, 'prod', ?)", (name, counts[name]))
    return registry


def _version(name: str, number: int, index: int, lineage: dict[str, Any]) -> Version:
    files = tuple(
        File(path, f"sha256:{kind}{index:063x}", size)
        for kind, (path, size) in enumerate((("adapter_config.json", 400), ("adapter_model.safetensors", 100_000)))
    )
    stamp = f"2026-{1 + index % 12:02}-{1 + index % 28:02}T12:00:{index % 60:02}.{index % 1_000_000:06}Z"
    return Version(name, number, stamp, files, File("lineage.json", f"sha256:f{index:063x}", 3000), lineage)


def _lineage(drawn: random.Random, index: int, parents: list[Version]) -> dict[str, Any]:
    task = TASKS[index % len(TASKS)]
    share, base = drawn.random(), drawn.random() / 2
    scores = {
        "adapter": {"exact_match": share, "loss": 2 - share, "rows": 200,
                    "intervals": {"exact_match": [max(0.0, share - 0.05), min(1.0, share + 0.05)]}},
        "base": {"exact_match": base, "loss": 2 - base, "rows": 200},
    }  # fmt: skip
    common = {
        "base": BASES[index % len(BASES)], "description": " ".join(drawn.sample(WORDS, 6)), "task": task,
        "adapter": {"rank": 8, "alpha": 16.0}, "metrics": {task: scores} if index % 4 else {},
    }  # fmt: skip
    if parents:
        entries = [{"reference": str(one), "manifest_digest": one.manifest_digest, "content_digest": one.content_digest,
                    "weight": 0.5} for one in parents]  # fmt: skip
        report = [{"module": f"layers.{layer}.q_proj", "relative_error": drawn.random()} for layer in range(60)]
        return {**common, "kind": "merge", "parents": entries, "merge": {"method": "ties"}, "merge_report": report}
    steps = range(1, 61)
    return {
        **common, "kind": "train", "recipe": {"text": f"[train]\nepochs = 2\nseed = {index}\n" + "# as it was\n" * 20},
        "data": [{"role": "train", "file": "data.jsonl", "rows": 400, "digest": f"sha256:d{index:063x}"}],
        "training": {"steps": 60, "seconds": 31.0, "curve": [[step, 3 / step + drawn.random()] for step in steps]},
        "samples": [{"prompt": f"What is {number}?", "wanted": "it", "base": "no", "adapter": "it"}
                    for number in range(3)],
    }  # fmt: skip
