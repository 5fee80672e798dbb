"""Merge plans in TOML: what they say is what the options say, and every mistake has its line."""

import importlib
import os
from pathlib import Path

import pytest

from adapterhub_local.errors import BadRecipe, NotFound
from adapterhub_local.hub.client import connect
from adapterhub_local.merge.merge import merge_to_path
from adapterhub_local.merge.plan import make_plan
from adapterhub_local.merge.plan_file import load_plan
from adapterhub_local.merge.rank_rule import RankRule
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.cli.test_cli import qhub  # noqa: F401
from tests.hub_server import HubServer, Repo
from tests.merges import save_adapter

PLAN = """\
[merge]
method = "ties"
density = 0.5
rank = 2

[[adapter]]
reference = "a.safetensors"
weight = 0.7

[[adapter]]
reference = "sub/b.safetensors"
weight = 3
alpha = 4

[output]
path = "out.safetensors"
"""


def test_a_plan_says_what_the_options_say(tmp_path: Path) -> None:
    """Files are found beside the plan, whatever the current folder; the merge is the one made by hand."""
    a, b = save_adapter(tmp_path / "a", 1), save_adapter(tmp_path / "sub" / "b", 2)
    (tmp_path / "plan.toml").write_text(PLAN)
    written = load_plan(tmp_path / "plan.toml")
    assert written.weights == (0.7, 3.0)
    assert written.alphas == (None, 4)
    assert written.formula.rule == RankRule("rank", 2)
    assert written.path == tmp_path / "out.safetensors"
    plan = make_plan(written.labels, written.weights, Registry(), alpha=written.alphas, formula=written.formula)
    by_hand = make_plan([str(a), str(b)], [0.7, 3], Registry(), formula=written.formula)
    assert merge_to_path(plan, written.path).to_json() == merge_to_path(by_hand, tmp_path / "h.safetensors").to_json()


def test_qhub_merge_takes_a_plan(qhub, tmp_path: Path) -> None:  # noqa: F811
    """`qhub merge plan.toml` writes what the plan says; a second time it is refused, and --name goes elsewhere."""
    save_adapter(tmp_path / "a", 1)
    save_adapter(tmp_path / "sub" / "b", 2)
    (tmp_path / "plan.toml").write_text(PLAN)
    dry = qhub("merge", tmp_path / "plan.toml", "--dry-run")
    assert (dry.code, "ties of 2 adapters, rank 2" in dry.out) == (0, True)
    assert qhub("merge", tmp_path / "plan.toml").code == 0
    assert (tmp_path / "out.safetensors").is_file()
    assert qhub("merge", tmp_path / "plan.toml").code == 2
    assert qhub("merge", tmp_path / "plan.toml", "--name", "x").code == 0
    assert Registry().resolve("x").lineage["merge"]["method"] == "ties"
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("density = 0.5", "densty = 0.5", ":3: unknown key 'densty' in [merge]: did you mean 'density'?"),
        ("density = 0.5", 'density = "half"', ":3: merge.density must be a finite number, not 'half'"),
        ("density = 0.5", "density = inf", ":3: merge.density must be a finite number"),
        ("density = 0.5", "epsilon = 0.5", ":2: ties has no parameter 'epsilon'"),
        ('method = "ties"', 'method = "tis"', ":2: there is no merge method 'tis': did you mean ties?"),
        ("rank = 2", "rank = 0", ":4: rank is '0'"),
        ("rank = 2", "rank = 2.5", ":4: rank is '2.5'"),
        ("rank = 2", "rank = 2\nenergy = 0.5", ":4: rank and energy exclude each other"),
        ("weight = 3", "weight = true", ":12: adapter.weight must be a finite number, or a list of them"),
        ("weight = 3", "wieght = 3", ":12: unknown key 'wieght' in [adapter]: did you mean 'weight'?"),
        ("weight = 3\n", "", ":10: [[adapter]] 2 needs 'weight'"),
        ("[output]", "[outputs]", ":15: unknown table [outputs]: did you mean 'output'?"),
        ('path = "out.safetensors"', 'name = "Bad Name"', ":16: 'Bad Name' is not a name"),
        ('path = "out.safetensors"', 'alias = "prod"', ":16: alias needs name"),
        ("[[adapter]]", "[adapter]", "not TOML"),
        ("[merge]", "merge = 1", "not TOML"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, old: str, new: str, told: str) -> None:
    """File, line, key, and what it may be."""
    (tmp_path / "plan.toml").write_text(PLAN.replace(old, new))
    with pytest.raises(BadRecipe) as caught:
        load_plan(tmp_path / "plan.toml")
    assert told in str(caught.value).replace("merge = 1", "") or "not TOML" in told
    assert str(tmp_path / "plan.toml") in str(caught.value)


@pytest.mark.parametrize("text", ["", "merge = 1", "adapter = []", "adapter = [1]", '[merge]\nrank = ["x"]'])
def test_a_plan_without_its_tables_is_refused(tmp_path: Path, text: str) -> None:
    """Nothing, or something else than tables, is not a plan; neither is a file that is not there or not text."""
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(BadRecipe):
        load_plan(tmp_path / "plan.toml")
    with pytest.raises(NotFound):
        load_plan(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadRecipe):
        load_plan(tmp_path / "binary.toml")


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    """Two wrong keys in two tables are two lines."""
    (tmp_path / "plan.toml").write_text(PLAN.replace("rank = 2", "rnk = 2").replace("alpha = 4", "alpah = 8"))
    with pytest.raises(BadRecipe) as caught:
        load_plan(tmp_path / "plan.toml")
    assert len(str(caught.value).splitlines()) == 2


def test_a_hub_id_is_pulled_first_and_recorded(
    qhub,  # noqa: F811
    tmp_path: Path,
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is named ORG/REPO@REVISION and is not here comes from the Hub as a version; a dry run fetches nothing."""
    folder = tmp_path / "theirs"
    save_adapter(tmp_path / "made", 3)
    assert qhub("merge", tmp_path / "made.safetensors", "--weights", "1", "-o", folder).code == 0
    mine = save_adapter(tmp_path / "mine", 1)
    line = ("merge", "Someone/Theirs@v1", mine, "--weights", "0.5,0.5")
    with HubServer() as hub:
        here = lambda endpoint, token: connect(hub.endpoint, hub.token)  # noqa: E731
        monkeypatch.setattr(importlib.import_module("adapterhub_local.hub.pull"), "connect", here)
        hub.repos["Someone/Theirs"] = repo = Repo()
        commit = repo.commit({path.name: path.read_bytes() for path in folder.iterdir()})
        repo.tags["v1"] = commit
        dry = qhub(*line, "--dry-run")
        assert (dry.code, "a dry run fetches nothing: `qhub pull Someone/Theirs@v1`" in dry.err) == (2, True)
        assert Registry(home).names() == []
        done = qhub(*line, "--name", "both")
        assert done.code == 0, done.err
        assert "theirs@1 pulled from Someone/Theirs" in done.err
        again = qhub(*line, "--name", "both")
        assert "theirs@1 here already" in again.err
        missing = qhub("merge", "someone/none", mine, "--weights", "1,1", "--name", "x")
        assert (missing.code, "there is no adapter 'someone/none'" in missing.err) == (2, True)
        assert "Nor on the Hub: " in missing.err
    parent = Registry(home).resolve("both@2").lineage["parents"][0]
    assert (parent["reference"], parent["pulled_from"]["commit"]) == ("theirs@1", commit)
    assert sorted(Registry(home).names()) == ["both", "theirs"]
