"""Time grows with the number of versions, not with its square or faster: counted in steps of SQLite and in nodes."""

import json
from pathlib import Path

import pytest

from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.ancestry import Node, ancestry, dot, text
from adapterhub_local.registry.archive import read_archive, write_archive
from adapterhub_local.registry.catalog import Condition, find
from tests.stores import LINEAGE, files, merged


def chain(registry: Registry, levels: int) -> Version:
    """Two versions, merged, and merged again with each other at every level: 2 to the power of `levels` paths."""
    left, right = (registry.publish(name, files(seed), LINEAGE) for seed, name in ((1, "a"), (2, "b")))
    for _ in range(levels):
        left, right = merged(registry, "left", (left, 0.5), (right, 0.5)), merged(registry, "r", (left, 1), (right, 1))
    return merged(registry, "top", (left, 0.5), (right, 0.5))


def test_ancestry_of_repeated_merges_is_linear(tmp_path: Path) -> None:
    """Sixty levels of diamonds are a tree of as many versions, printed, drawn and archived as such."""
    registry = Registry()
    top = chain(registry, 60)
    node = ancestry(registry, top)
    seen: set[int] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if id(current.parents) not in seen:
            seen.add(id(current.parents))
            pending += current.parents
    assert len(seen) <= 130
    lines = list(text(node))
    assert len(lines) <= 4 * 61 + 3
    assert sum("as above" in line for line in lines) >= 59
    assert len(list(dot(node))) <= 130 + 250
    write_archive(registry, top, tmp_path / "top.tar")
    assert len(read_archive(Registry(tmp_path / "other"), tmp_path / "top.tar")) == 123


def test_a_long_line_of_merges_is_shown_whole() -> None:
    """Three hundred merges one after the other are shown to the first, and nothing runs out of stack."""
    registry = Registry()
    version = registry.publish("a", files(1), LINEAGE)
    for _ in range(300):
        version = merged(registry, "m", (version, 1.0))
    lines = list(text(ancestry(registry, version)))
    assert len(lines) == 301
    assert "a@1" in lines[-1]


def test_a_lineage_that_says_it_was_made_of_itself() -> None:
    """A version that claims to be an import of its own parent has an end."""
    registry = Registry()
    digest = "sha256:" + "5" * 64
    parents = [{"reference": "x@1", "manifest_digest": digest, "weight": 1.0}]
    version = registry.publish(
        "a", files(1), {**LINEAGE, "parents": parents, "imported_from": {"manifest_digest": digest}}
    )
    node = ancestry(registry, version)
    assert node.parents == (Node("x@1", "not in this registry", (), 1.0),)


def steps(registry: Registry, **options: object) -> int:
    """The steps of SQLite's machine that a search takes, in thousands."""
    connection = registry.database.connection()
    assert connection is not None
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    connection.set_progress_handler(tick, 1000)
    find(registry, limit=10, **options)  # type: ignore[arg-type]
    connection.set_progress_handler(None, 0)
    return count


@pytest.mark.parametrize(
    "options",
    [{"sort": "exact_match"}, {"sort": "loss", "task": "t"}, {"sort": "exact_match", "name": "n1"},
     {"conditions": [Condition.parse("exact_match>0.5")], "sort": "exact_match"}],
    ids=str,
)  # fmt: skip
def test_sorting_by_a_metric_is_not_quadratic(options: dict[str, object]) -> None:
    """Four times the versions take about four times the steps."""
    taken = []
    registry = Registry()
    registry.publish("first", files(1), {**LINEAGE, "metrics": {"t": {"adapter": {"exact_match": 0.1, "loss": 2.0}}}})
    row = registry.database.rows("SELECT * FROM versions")[0]
    number = 0
    for total in (500, 2000):
        with registry.database.writing() as db:
            while number < total:
                number += 1
                metrics = {"t": {"adapter": {"exact_match": number % 97 / 97, "loss": number % 89 / 7}}}
                values = (f"n{number % 7}", number, f"sha256:{number:064x}", f"sha256:{number:064x}", None,
                          "2026", row["manifest"], json.dumps({**LINEAGE, "metrics": metrics}))  # fmt: skip
                db.execute("INSERT INTO versions (name, number, manifest_digest, content_digest, base_fingerprint,"
                           " created_at, manifest, lineage) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)  # fmt: skip
        taken.append(steps(registry, **options))
    assert taken[1] <= 8 * taken[0] + 50, taken
