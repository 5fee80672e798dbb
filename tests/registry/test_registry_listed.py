"""The tables that lists read say what the versions say: after every change, a rebuild, an update, and older writers."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_local.bounds import Bound
from adapterhub_local.errors import NotFound
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.ancestry import children
from adapterhub_local.registry.catalog import Condition, is_lower_better, metrics_in
from adapterhub_local.registry.gc import remove
from adapterhub_local.registry.listing import Wanted, bases_in, page
from adapterhub_local.registry.marks import add_tags, tags_of
from adapterhub_local.registry.migrations import MIGRATIONS
from adapterhub_local.registry.rebuild import rebuild
from adapterhub_local.registry.rows import insert_version
from adapterhub_local.registry.version import File
from tests.stores import LINEAGE, files, small_store

BASES = (
    {"name": "tiny", "hub_id": "org/tiny", "fingerprint": "sha256:" + "a" * 64},
    {"name": "tiny", "fingerprint": "sha256:" + "a" * 20 + "c" * 44},
    {"name": "big", "fingerprint": "sha256:" + "b" * 64},
    {"name": "big"},
    {},
)
METRICS = ("exact_match", "loss")
SCORE = st.sampled_from((0.1, 0.5, 0.9))
SCORES = st.fixed_dictionaries({}, optional=dict.fromkeys(METRICS, SCORE)).map(lambda scores: {"adapter": scores})
LINEAGES = st.fixed_dictionaries(
    {"kind": st.sampled_from(("train", "merge")), "base": st.sampled_from(BASES)},
    optional={"task": st.sampled_from(("sql", "tone")),
              "metrics": st.dictionaries(st.sampled_from(("sql", "tone")), SCORES)},
)  # fmt: skip
# what happens to a registry, in this order: a version of a name, perhaps made of earlier ones
STEP = st.tuples(st.sampled_from("abcd"), LINEAGES, st.lists(st.integers(0, 9), max_size=3))
LATER = st.lists(
    st.one_of(
        st.tuples(st.just("remove"), st.integers(0, 9)),
        st.tuples(st.just("tag"), st.integers(0, 9), st.sampled_from(("good", "old"))),
        st.tuples(st.just("score"), st.integers(0, 9), st.sampled_from(("sql", "tone")), SCORES),
    ),
    max_size=6,
)
WANTED = st.builds(
    Wanted,
    name=st.sampled_from((None, None, "a")),
    base=st.sampled_from((None, None, "tiny", "org/tiny", "big", "sha256:" + "a" * 20, "none")),
    kind=st.sampled_from((None, "merge")),
    task=st.sampled_from((None, "sql")),
    tags=st.sampled_from(((), ("good",), ("good", "old"))),
    conditions=st.sampled_from(((), (Condition("exact_match", Bound(">", 0.4)),))),
    every=st.booleans(),
    sort=st.sampled_from(("name", "created", *METRICS)),
    allowed=st.sampled_from((None, ("a", "b"))),
)


def fill(registry: Registry, steps: list[Any], later: list[Any]) -> None:
    """Carry these steps out. One version has a score of every metric, so that each may be asked for."""
    scores = {"adapter": {"exact_match": 0.3, "loss": 0.3}}
    made = [registry.publish("d", files(), {**LINEAGE, "metrics": {"tone": scores}})]
    for index, (name, lineage, parents) in enumerate(steps):
        entries = [
            {"reference": str(one), "manifest_digest": one.manifest_digest, "weight": 1.0}
            for one in (made[parent % len(made)] for parent in parents)
        ]
        made.append(registry.publish(name, files(index), {**lineage, "parents": entries}))
    for what, index, *more in later:
        version = made[index % len(made)]
        if version not in (kept := registry.versions()) or version == made[0]:
            continue
        match what:
            case "remove" if len(kept) > 1:
                remove(registry, version, force=True)
            case "tag":
                add_tags(registry, version, (more[0],))
            case "score":
                registry.add_evaluation(version, *more)


def plain(registry: Registry, wanted: Wanted) -> list[str]:
    """The list by its definition, from whole versions."""
    found = [version for version in registry.versions() if _fits(registry, version, wanted)]
    if not wanted.every:
        found = list({version.name: version for version in found}.values())  # the last of a name is its newest
    found.sort(key=lambda version: (version.name, -version.number))
    if wanted.sort == "created":
        found.sort(key=lambda version: version.created_at, reverse=True)
    elif wanted.sort != "name":
        sign = 1 if is_lower_better(wanted.sort) else -1
        values = {str(one): _values(registry, one, wanted.sort, wanted.task) for one in found}
        found.sort(key=lambda one: min((sign * value for value in values[str(one)]), default=float("inf")))
    return [str(version) for version in found]


def _values(registry: Registry, version: Version, metric: str, task: str | None) -> list[float]:
    metrics = registry.metrics(version)
    return [
        scores["adapter"][metric]
        for name, scores in metrics.items()
        if task in (None, name) and metric in scores["adapter"]
    ]


def _fits(registry: Registry, version: Version, wanted: Wanted) -> bool:
    lineage, metrics = version.lineage, registry.metrics(version)
    base = lineage.get("base") or {}
    named = wanted.base in (base.get("name"), base.get("hub_id"))
    if fingerprint := base.get("fingerprint"):  # named as the newest version of that base names it
        newest = next(one for one in bases_in(registry) if one["fingerprint"] == fingerprint)
        named = wanted.base in (newest["name"], newest["hub_id"])
        named |= len(wanted.base or "") >= 15 and fingerprint.startswith(wanted.base or "")
    of_task = lineage.get("task") == wanted.task or any(metrics.get(str(wanted.task), {}).get("adapter", {}))
    return (
        wanted.name in (None, version.name)
        and (wanted.base is None or named)
        and wanted.kind in (None, lineage["kind"])
        and (wanted.task is None or bool(wanted.conditions) or of_task)
        and set(wanted.tags) <= set(tags_of(registry, version))
        and all(
            any(one.bound.holds(value) for value in _values(registry, version, one.metric, wanted.task))
            for one in wanted.conditions
        )
        and (wanted.allowed is None or version.name in wanted.allowed)
    )


def whole(registry: Registry, wanted: Wanted) -> list[str]:
    """The list, page by page; every page says how many there are."""
    shown: list[str] = []
    totals, after = set(), None
    while True:
        found = page(registry, wanted, after=after, limit=3)
        totals.add(found.total)
        shown += [entry["reference"] for entry in found.entries]
        if (after := found.after) is None:
            assert totals == {len(shown)}
            return shown


def check(registry: Registry, wanted: Wanted) -> None:
    """Page by page it is the list by its definition; bases and children, too."""
    versions = registry.versions()
    seen = [version for version in versions if wanted.allowed is None or version.name in wanted.allowed]
    known = {metric for version in seen for metric in METRICS if _values(registry, version, metric, None)}
    assert metrics_in(registry, wanted.allowed) == sorted(known)
    asked = {wanted.sort, *(condition.metric for condition in wanted.conditions)} & {*METRICS}
    if known and not asked <= known:  # a metric that nobody has is a mistake, where there are others
        with pytest.raises(NotFound, match="no version has a score"):
            page(registry, wanted, limit=3)
    else:
        assert whole(registry, wanted) == plain(registry, wanted)
    counts = {base["fingerprint"]: base["num_versions"] for base in bases_in(registry)}
    fingerprints = [version.base_fingerprint for version in versions if version.base_fingerprint]
    assert counts == {one: fingerprints.count(one) for one in fingerprints}
    for version in versions:
        same = [
            str(child) for child in versions
            if any(str(version) == one["reference"] or version.manifest_digest == one.get("manifest_digest")
                   for one in child.lineage.get("parents") or ())
        ]  # fmt: skip
        assert children(registry, version) == same


@settings(max_examples=40)
@given(st.lists(STEP, max_size=8), LATER, st.lists(WANTED, min_size=1, max_size=6), st.booleans())
def test_lists_are_what_their_definition_says(
    steps: list[Any], later: list[Any], asked: list[Wanted], is_made_again: bool
) -> None:
    """Any registry, any filters and order, any page; and after a rebuild of the database from the blobs the same."""
    with TemporaryDirectory() as folder:
        registry = Registry(folder)
        with closing(registry.database):
            fill(registry, steps, later)
            if is_made_again:
                rebuild(registry)
            for wanted in asked:
                check(registry, wanted)


def older(path: Path) -> sqlite3.Connection:
    """A database as the qhub before had made it, with what a process of that qhub holds open."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(f"PRAGMA journal_mode = WAL; {''.join(MIGRATIONS[:7])} PRAGMA user_version = 7")
    return connection


def test_an_older_home_and_an_older_process(tmp_path: Path) -> None:
    """A home of the qhub before is brought up to date once, and what a process of it still writes is listed."""
    made = small_store(Registry(tmp_path / "source"))
    rows = [
        (one.name, one.number, one.manifest_digest, one.content_digest, one.base_fingerprint, one.created_at,
         one.manifest.decode(), json.dumps(dict(one.lineage))) for one in made
    ]  # fmt: skip
    columns = "name, number, manifest_digest, content_digest, base_fingerprint, created_at, manifest, lineage"
    insert = f"INSERT INTO versions ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
    (tmp_path / "home").mkdir()
    with closing(older(tmp_path / "home" / "registry.db")) as before:
        before.executemany(insert, rows[:2])
        before.execute("INSERT INTO removals VALUES ('a', 1, '2026')")
        registry = Registry(tmp_path / "home", checked=False)
        assert [entry["reference"] for entry in page(registry, Wanted(every=True)).entries] == ["a@2"]
        before.execute(insert, rows[2])
        assert plain(registry, Wanted(every=True)) == ["a@2", "team/b@1"]
        check(registry, Wanted(every=True))
        before.execute("INSERT INTO removals VALUES ('a', 2, '2026')")
        check(registry, Wanted(every=True))


@pytest.mark.parametrize("parents", [["a@1"], "a@1", 3, {"reference": "a@1"}, [None, 1, []], [{}]], ids=str)
def test_parents_that_are_none(registry: Registry, parents: Any) -> None:
    """Whatever stands where parents should be, the version is listed and is nobody's child."""
    version = registry.publish("a", files(), LINEAGE)
    odd = Version("b", 1, "2026", (File("f", "sha256:" + "1" * 64, 1),), File("l", "sha256:" + "2" * 64, 1),
                  {"parents": parents})  # fmt: skip
    with registry.database.writing() as db:
        insert_version(db, odd)
    assert page(registry, Wanted()).total == 2
    assert children(registry, version) == []


def test_metrics_that_occur(registry: Registry) -> None:
    """Each once, sorted."""
    assert metrics_in(registry) == []
    for seed, metric in enumerate(("loss", "accuracy", "loss")):
        scored = {"t": {"adapter": {metric: 0.5, "rows": 9}}}
        registry.publish("a", files(seed), {**LINEAGE, "metrics": scored})
    assert metrics_in(registry) == ["accuracy", "loss", "rows"]
