"""Protected aliases: what is asked of a version, at every door, by several actors, and after a rebuild from blobs."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.actor import acting_as
from adapterhub_local.bounds import Bound
from adapterhub_local.errors import InputError, NotFound, Protected
from adapterhub_local.registry import Registry
from adapterhub_local.registry.gates import Requirement
from adapterhub_local.registry.gc import remove
from adapterhub_local.registry.history import history
from adapterhub_local.registry.marks import remove_alias, rollback
from adapterhub_local.registry.protecting import (
    approvals_of,
    approve,
    check_reachable,
    protect,
    protections_of,
    unprotect,
)
from adapterhub_local.registry.rebuild import rebuild
from tests.patience import PATIENCE
from tests.stores import LINEAGE, files


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """`sentiment` with four versions of scores 0.5, 0.7, 0.9 and none; prod points to the first."""
    made = Registry(tmp_path / "home")
    for seed, score in enumerate((0.5, 0.7, 0.9)):
        metrics = {"sentiment": {"adapter": {"exact_match": score, "loss": 1 - score}}}
        made.publish("sentiment", files(seed), {**LINEAGE, "metrics": metrics})
    made.publish("sentiment", files(9), LINEAGE)
    made.set_alias("sentiment", "prod", 1)
    return made


DOORS: dict[str, Callable[[Registry], object]] = {
    "set": lambda registry: registry.set_alias("sentiment", "prod", 2),
    "publish": lambda registry: registry.publish("sentiment", files(5), LINEAGE, alias="prod"),
    "rollback": lambda registry: rollback(registry, "sentiment", "prod"),
    "remove": lambda registry: remove_alias(registry, "sentiment", "prod"),
    "rm --force": lambda registry: remove(registry, registry.resolve("sentiment@3"), force=True),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_protected_alias_moves_by_no_door(registry: Registry, door: str) -> None:
    """Whatever moves or removes it is refused, and nothing at all is changed."""
    registry.set_alias("sentiment", "prod", 3)
    protect(registry, "sentiment", "prod", ["sentiment.exact_match>=0.8"])
    before = history(registry).entries
    versions = [str(version) for version in registry.versions()]
    with pytest.raises(Protected, match=r"sentiment@prod is protected.*Nothing was changed|unprotect sentiment prod"):
        DOORS[door](registry)
    assert registry.aliases("sentiment") == {"prod": 3}
    assert [str(version) for version in registry.versions()] == versions
    assert history(registry).entries == before


@pytest.mark.parametrize(
    ("require", "number", "said"),
    [
        ("sentiment.exact_match>=0.8", 2, "must have 'sentiment.exact_match>=0.8' and has 0.7"),
        ("exact_match>=0.8", 2, "has 0.7"),
        ("sentiment.loss<0.2", 2, "has 0.3"),
        ("sentiment.exact_match>=0.8", 4, "has no score sentiment.exact_match: `qhub eval sentiment@4"),
        ("sentiment.exact_mtch>=0.8", 3, r"has no score sentiment.exact_mtch \(it has sentiment.exact_match\)"),
    ],
)
def test_the_unmet_condition_is_named(registry: Registry, require: str, number: int, said: str) -> None:
    """What a version lacks is said with what it has; the version that has it passes."""
    protect(registry, "sentiment", "prod", [require])
    with pytest.raises(Protected, match=said):
        registry.set_alias("sentiment", "prod", number)
    if "mtch" not in require:
        registry.set_alias("sentiment", "prod", 3)
        assert registry.aliases("sentiment") == {"prod": 3}


def test_a_later_evaluation_counts(registry: Registry) -> None:
    """The newest score of a version decides, whether it got better or worse."""
    protect(registry, "sentiment", "prod", ["sentiment.exact_match>=0.8"])
    registry.add_evaluation(registry.resolve("sentiment@3"), "sentiment", {"adapter": {"exact_match": 0.1}})
    with pytest.raises(Protected, match=r"has 0\.1"):
        registry.set_alias("sentiment", "prod", 3)
    registry.add_evaluation(registry.resolve("sentiment@4"), "sentiment", {"adapter": {"exact_match": 0.85}})
    registry.set_alias("sentiment", "prod", 4)


def test_a_metric_without_a_task_must_hold_on_every_task(registry: Registry) -> None:
    """One task that fails is enough to refuse."""
    registry.add_evaluation(registry.resolve("sentiment@3"), "irony", {"adapter": {"exact_match": 0.2}})
    protect(registry, "sentiment", "prod", ["exact_match>=0.8"])
    with pytest.raises(Protected, match=r"has 0\.2"):
        registry.set_alias("sentiment", "prod", 3)


def test_approvals_are_of_others_and_of_one_version(registry: Registry) -> None:
    """The mover's own does not count, nor one for another version or alias; twice by one actor is one."""
    protect(registry, "sentiment", "prod", approvals=2)
    third = registry.resolve("sentiment@3")
    with acting_as("ada"):
        approve(registry, third, "prod")
        approve(registry, third, "prod")
        approve(registry, registry.resolve("sentiment@2"), "prod")
        with pytest.raises(Protected, match="2 approvals from others than ada and has 0; that of ada, who moves it"):
            registry.set_alias("sentiment", "prod", 3)
    with acting_as("bob"):
        approve(registry, third, "canary")
        with pytest.raises(Protected, match="2 approvals from others than bob and has 1"):
            registry.set_alias("sentiment", "prod", 3)
        approve(registry, third, "prod")
    with acting_as("eve"):
        registry.set_alias("sentiment", "prod", 3)
    assert next(entry["actor"] for entry in history(registry, events=["alias"]).entries) == "eve"


def test_an_approval_is_taken_back_by_who_gave_it(registry: Registry) -> None:
    """After that it does not count; who gave none has none to take back, and nothing is recorded."""
    protect(registry, "sentiment", "prod", approvals=1)
    third = registry.resolve("sentiment@3")
    with acting_as("ada"):
        approve(registry, third, "prod")
    before = history(registry).entries
    with acting_as("bob"), pytest.raises(NotFound, match="you did not approve"):
        approve(registry, third, "prod", is_given=False)
    assert history(registry).entries == before
    with acting_as("ada"):
        assert approve(registry, third, "prod", is_given=False) == []
    with acting_as("bob"), pytest.raises(Protected, match="has 0"):
        registry.set_alias("sentiment", "prod", 3)


def test_protection_and_approvals_come_back_from_blobs(registry: Registry) -> None:
    """Without the database a rebuild keeps who did what, what is protected, what is approved, and the refusals."""
    protect(registry, "sentiment", "prod", ["sentiment.exact_match>=0.8"], approvals=1)
    protect(registry, "sentiment", "canary", ["exact_match>0"])
    unprotect(registry, "sentiment", "canary")
    with acting_as("key:3f9c21aa"):
        approve(registry, registry.resolve("sentiment@3"), "prod")
        approve(registry, registry.resolve("sentiment@2"), "prod")
    before, approved = history(registry).entries, approvals_of(registry, registry.resolve("sentiment@3"))
    registry.database.close()
    for path in registry.home.root.glob("registry.db*"):
        path.unlink()
    assert rebuild(Registry(registry.home)).lost == []
    again = Registry(registry.home)
    assert history(again).entries == before
    assert list(protections_of(again, "sentiment")) == ["prod"]
    assert approvals_of(again, again.resolve("sentiment@3")) == approved
    with pytest.raises(Protected, match=r"has 0\.7"):
        again.set_alias("sentiment", "prod", 2)
    again.set_alias("sentiment", "prod", 3)


def test_what_no_new_version_can_have_is_refused_before_the_work(registry: Registry) -> None:
    """An alias that wants approvals cannot be promised to a version that is not there yet; others can."""
    protect(registry, "sentiment", "prod", approvals=1)
    with pytest.raises(Protected, match="leave the alias out"):
        check_reachable(registry, "sentiment", "prod")
    check_reachable(registry, "sentiment", "canary")
    protect(registry, "sentiment", "prod", ["exact_match>0.5"])
    check_reachable(registry, "sentiment", "prod")


@pytest.mark.parametrize(
    ("require", "approvals", "said"),
    [
        ([], 0, "say what is asked"),
        (["exact_match"], 0, "is not a requirement"),
        ([">=0.8"], 0, "is not a requirement"),
        (["a b>=0.8"], 0, "is not a requirement"),
        (["a>=high"], 0, "is not a requirement"),
        ([], -1, "ask for 0 to 20"),
        ([], 21, "ask for 0 to 20"),
    ],
)
def test_what_asks_nothing_is_refused(registry: Registry, require: list[str], approvals: int, said: str) -> None:
    """A protection asks for something that can be read."""
    with pytest.raises(InputError, match=said):
        protect(registry, "sentiment", "prod", require, approvals)
    assert protections_of(registry, "sentiment") == {}


@given(
    st.sampled_from(["a", "t.m", "my-task.exact_match"]), st.sampled_from(["<", "<=", ">", ">=", "="]), st.floats(-9, 9)
)
def test_a_requirement_reads_back(score: str, operator: str, bound: float) -> None:
    """What is shown of a requirement is read as the same, to the digits that are shown."""
    made = Requirement(score, Bound(operator, float(f"{bound:g}")))
    assert Requirement.parse(str(made)) == made


MOVE = """
import sys
from adapterhub_local.registry import Registry
from adapterhub_local.errors import InUse
registry = Registry(sys.argv[1])
won = 0
for number in [2, 3] * 20:
    try:
        registry.set_alias("sentiment", "prod", number, expect=5 - number)
        won += 1
    except InUse:
        pass
print(won)
"""


def test_two_actors_who_race_for_an_alias_are_told_apart(registry: Registry) -> None:
    """Each move that won is in the history once, by who made it, and every move starts where the last one ended."""
    registry.set_alias("sentiment", "prod", 3)
    start = len(history(registry, events=["alias"], limit=1000).entries)
    racers = {
        name: subprocess.Popen(
            [sys.executable, "-c", MOVE, str(registry.home.root)],
            env={**os.environ, "QHUB_ACTOR": name}, stdout=subprocess.PIPE, text=True,
        )
        for name in ("ada", "bob")
    }  # fmt: skip
    won = {name: int(racer.communicate(timeout=PATIENCE)[0]) for name, racer in racers.items()}
    moves = history(registry, events=["alias"], limit=1000).entries[:-start]
    assert {name: sum(move["actor"] == name for move in moves) for name in racers} == won
    assert sum(won.values()) >= 20
    pointed = 3
    for move in reversed(moves):
        assert (move["old"], move["new"]) == (pointed, 5 - pointed)
        pointed = move["new"]
    assert registry.aliases("sentiment") == {"prod": pointed}
