"""Finding versions: filters, sorting, words, tags; and the history of aliases."""

import importlib
import json

import pytest

from adapterhub_local.cli.main import run
from adapterhub_local.errors import BadReference, InputError, InUse, NotFound
from adapterhub_local.registry import Registry
from adapterhub_local.registry.catalog import Condition, find, search
from adapterhub_local.registry.fsck import fsck
from adapterhub_local.registry.marks import (
    add_tags,
    alias_log,
    describe,
    description_of,
    remove_alias,
    remove_tags,
    rollback,
    tags_of,
)
from adapterhub_local.registry.rebuild import rebuild
from tests.stores import LINEAGE, files


@pytest.fixture
def registry() -> Registry:
    """Five versions of three names with different bases, tasks and scores."""
    registry = Registry()
    for index, (name, base, task, score) in enumerate(
        [("sql", "small", "sql", 0.7), ("sql", "small", "sql", 0.9), ("tone", "small", "tone", 0.85),
         ("team/sum", "large", "sum", 0.2), ("sql", "large", "sql", 0.4)]
    ):  # fmt: skip
        lineage = {
            "kind": "train",
            "task": task,
            "base": {"name": base, "fingerprint": "sha256:" + base[0].encode().hex() * 32},
            "description": f"made for {task} on the {base} base",
            "recipe": {"train": {"optimizer": "paged_adamw_8bit", "seed": index}},
            "metrics": {task: {"adapter": {"exact_match": score, "loss": 1 - score}, "base": {"exact_match": 0.0}}},
        }
        registry.publish(name, files(index), lineage)
    return registry


def names(versions: list) -> list[str]:
    """The references of versions, in their order."""
    return [str(version) for version in versions]


def test_without_filters_the_newest_of_each_name(registry: Registry) -> None:
    """Nothing asked for is the newest version of every name, by name."""
    assert names(find(registry)) == ["sql@3", "team/sum@1", "tone@1"]
    assert names(find(registry, name="sql")) == ["sql@1", "sql@2", "sql@3"]
    assert names(find(registry, limit=1)) == ["sql@3"]


def test_filters_hold_together(registry: Registry) -> None:
    """Base, tag, metric and task each narrow what is found, alone and together."""
    assert names(find(registry, base="small")) == ["sql@1", "sql@2", "tone@1"]
    assert names(find(registry, base="sha256:6c6c6c6c6c6c")) == ["sql@3", "team/sum@1"]
    assert names(find(registry, task="sql")) == ["sql@1", "sql@2", "sql@3"]
    above = Condition.parse("exact_match>0.8")
    assert names(find(registry, conditions=[above])) == ["sql@2", "tone@1"]
    assert names(find(registry, conditions=[above], task="tone")) == ["tone@1"]
    assert names(find(registry, conditions=[above, Condition.parse("loss <= 0.12")])) == ["sql@2"]
    add_tags(registry, registry.resolve("sql@2"), ("good", "v=1"))
    assert names(find(registry, tags=["good"])) == ["sql@2"]
    assert names(find(registry, tags=["good", "bad"])) == []


def test_sorting_by_a_metric_puts_the_best_first(registry: Registry) -> None:
    """Scores go down, losses up, versions without the metric come last; created is newest first."""
    registry.publish("plain", files(9), LINEAGE)
    by_score = names(find(registry, task=None, tags=[], sort="exact_match", base="small"))
    assert by_score == ["sql@2", "tone@1", "sql@1"]
    assert names(find(registry, sort="loss")) == ["tone@1", "sql@3", "team/sum@1", "plain@1"]
    assert names(find(registry, sort="created"))[0] == "plain@1"


def test_a_later_evaluation_replaces_the_score(registry: Registry) -> None:
    """A filter sees the newest score of a task, also where the lineage said another, also after a rebuild."""
    version = registry.resolve("sql@1")
    registry.add_evaluation(version, "sql", {"adapter": {"exact_match": 0.95, "loss": 0.1, "rows": 3}})
    for _ in range(2):
        assert names(find(registry, conditions=[Condition.parse("exact_match>=0.95")])) == ["sql@1"]
        assert names(find(registry, conditions=[Condition.parse("exact_match=0.7")])) == []
        rebuild(registry)


@pytest.mark.parametrize("text", ["exact_match", ">0.8", "a>b", "a>>1", "a>1; DROP TABLE versions", "", "a=nan"])
def test_a_condition_that_is_none_is_refused(text: str) -> None:
    """What is not a metric with a bound is an InputError that shows how one is written."""
    with pytest.raises(InputError, match=r"exact_match>0\.8"):
        Condition.parse(text)


def test_words_are_found_wherever_they_are(registry: Registry) -> None:
    """Names, descriptions, tags and recipes are searched; all words must be there, beginnings count."""
    assert names(search(registry, "tone")) == ["tone@1"]
    assert set(names(search(registry, "large base"))) == {"sql@3", "team/sum@1"}
    assert len(search(registry, "paged_adamw")) == 5
    assert names(search(registry, "paged xyzzy")) == []
    add_tags(registry, registry.resolve("sql@1"), ("candidate",))
    describe(registry, registry.resolve("tone@1"), "polite answers für Größen")
    assert names(search(registry, "candid")) == ["sql@1"]
    assert names(search(registry, "größen")) == ["tone@1"]
    remove_tags(registry, registry.resolve("sql@1"), ("candidate",))
    assert search(registry, "candidate") == []
    for odd in ('"', "a* OR", "NEAR(", "'; --", "sql AND", "-tone"):
        try:
            search(registry, odd)
        except InputError:
            assert not any(letter.isalnum() for letter in odd)


def test_tags_and_descriptions_change_beside_the_version(registry: Registry) -> None:
    """They are all or nothing, do not touch the version's digests, and survive a rebuild of the database."""
    version = registry.resolve("sql@1")
    add_tags(registry, version, ("b", "a"))
    add_tags(registry, version, ("a",))
    with pytest.raises(BadReference):
        add_tags(registry, version, ("c", "not a tag"))
    with pytest.raises(NotFound, match="no tag 'z'"):
        remove_tags(registry, version, ("a", "z"))
    describe(registry, version, "the first")
    with pytest.raises(InputError):
        describe(registry, version, "two\nlines")
    rebuild(registry)
    assert tags_of(registry, version) == ["a", "b"]
    assert description_of(registry, version) == "the first"
    assert description_of(registry, registry.resolve("sql@2")) == "made for sql on the small base"
    assert registry.resolve("sql@1") == version
    assert fsck(registry).is_clean


def test_a_rollback_goes_back_step_by_step(registry: Registry) -> None:
    """Each rollback is one step back through what was set; a new move starts from there; all of it is logged."""
    for number in (1, 2, 3, 1):
        registry.set_alias("sql", "prod", number)
    assert rollback(registry, "sql", "prod") == 3
    assert rollback(registry, "sql", "prod", expect=3) == 2
    with pytest.raises(InUse):
        rollback(registry, "sql", "prod", expect=3)
    registry.set_alias("sql", "prod", 3)
    assert [rollback(registry, "sql", "prod") for _ in range(2)] == [2, 1]
    with pytest.raises(NotFound, match="never pointed elsewhere"):
        rollback(registry, "sql", "prod")
    assert registry.aliases("sql") == {"prod": 1}
    moves = [(move["action"], move["old_number"], move["new_number"]) for move in alias_log(registry, "sql", "prod")]
    assert moves[:6] == [
        *[("set", None, 1), ("set", 1, 2), ("set", 2, 3), ("set", 3, 1), ("rollback", 1, 3), ("rollback", 3, 2)]
    ]
    assert fsck(registry).is_clean


def test_a_removed_alias_can_be_brought_back(registry: Registry) -> None:
    """Removing an alias keeps its log; a rollback points it where it pointed."""
    registry.set_alias("sql", "prod", 2)
    remove_alias(registry, "sql", "prod", expect=2)
    assert registry.aliases("sql") == {}
    assert fsck(registry).is_clean
    with pytest.raises(NotFound):
        remove_alias(registry, "sql", "prod")
    assert rollback(registry, "sql", "prod") == 2


def test_the_verbs_say_it(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    """list, search, tag, describe, alias log, rollback and rm on the command line."""

    def qhub(line: str) -> str:
        with pytest.raises(SystemExit) as caught:
            run(line.split())
        captured = capsys.readouterr()
        assert caught.value.code == 0, captured.err
        return captured.out

    assert qhub("tag sql@2 good") == "sql@2: good\n"
    assert qhub("describe sql@2 best") == "sql@2: best\n"
    assert [entry["reference"] for entry in json.loads(qhub("list --tag good --metric exact_match>0.8 --json"))] == [
        "sql@2"
    ]
    assert "No version fits" in qhub("list --base other")
    assert [entry["reference"] for entry in json.loads(qhub("search best --json"))] == ["sql@2"]
    assert "No version has" in qhub("search xyzzy")
    shown = json.loads(qhub("show sql@2 --json"))
    assert (shown["tags"], shown["description"]) == (["good"], "best")
    for number in (1, 2):
        qhub(f"alias set sql prod {number}")
    assert qhub("alias rollback sql prod --expect 2") == "sql@prod -> sql@1\n"
    assert [move["action"] for move in json.loads(qhub("alias log sql prod --json"))] == ["set", "set", "rollback"]
    assert "rollback" in qhub("alias log sql")
    assert qhub("alias rm sql prod") == "removed sql@prod\n"


def test_a_long_list_is_cut_and_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`qhub list` shows the first so many adapters; --limit 0, --json and a name show all that were asked for."""
    monkeypatch.setattr(importlib.import_module("adapterhub_local.cli.list"), "MAX_ROWS", 3)
    registry = Registry()
    for index in range(5):
        registry.publish(f"n{index}", {"f": b"x"}, {"kind": "train"})
        registry.publish("n0", {"f": b"x"}, {"kind": "train"})
    for line, count, told in [
        (["list"], 3, True), (["list", "--limit", "0"], 5, False), (["list", "--limit", "2"], 2, True),
        (["list", "--json"], 5, False), (["list", "n0"], 6, False), (["list", "--base", "x"], 0, False),
    ]:  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            run(line)
        captured = capsys.readouterr()
        assert caught.value.code == 0
        shown = captured.out.count('"reference"') if "--json" in line else captured.out.count("@")
        assert shown == count, line
        assert ("of 5 adapters: --limit 0" in captured.err) is told, line


def test_a_metric_that_nobody_has_is_reported(registry: Registry) -> None:
    """A misspelt metric is not an empty list: the nearest ones are named; without any scores nothing can be wrong."""
    for call in ({"sort": "exact_mach"}, {"conditions": [Condition.parse("exact_mach>0.5")]}):
        with pytest.raises(NotFound, match="did you mean exact_match"):
            find(registry, **call)
    assert find(Registry(registry.home.root / "empty"), sort="exact_match") == []
