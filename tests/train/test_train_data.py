"""From every kind of data to a version: what was read, held out, cut and learned is in its lineage."""

import json
from pathlib import Path

import pytest

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.cli.main import run
from adapterhub_local.errors import InputError
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.train.train import train
from tests.chats import RECIPE, chat, write_recipe
from tests.tiny import save_tiny_model

NO_TEST = RECIPE.replace('test = "test.jsonl"\n', "")


@pytest.fixture
def bare_base(home: Home, tmp_path: Path) -> BaseInfo:
    """The base `bare`, which has no chat template."""
    return add_base("bare", save_tiny_model(tmp_path / "bare", chat_template=None), home)


def test_a_base_without_chat_template(bare_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """Such a base learns pairs and texts; for chats, what to set is said and nothing is left behind."""
    path = write_recipe(tmp_path, NO_TEST)
    with pytest.raises(InputError, match=r"no chat template.*data\.template = 'plain'"):
        train(load_recipe(path, ["base.name=bare"]), home)
    assert not home.runs.exists()
    assert Registry(home).versions() == []
    rows = [{"prompt": f"{'ab'[i % 2]} is", "completion": " yes" if i % 2 else " no"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "book.txt").write_text("Once upon a time there was a byte. " * 40)
    changes = ["base.name=bare", "data.test_share=0", "data.max_length=128"]
    pairs = train(load_recipe(path, [*changes, "data.train=pairs.jsonl"]), home)
    book = train(load_recipe(path, [*changes, "data.train=book.txt"]), home)

    assert pairs.lineage["training"]["template"] == book.lineage["training"]["template"] == "plain"
    assert pairs.lineage["training"]["examples"] == 16
    assert book.lineage["training"]["examples"] == 11
    assert [version.lineage["data"][0]["format"] for version in (pairs, book)] == ["prompt-completion", "text"]
    assert "metrics" not in book.lineage


def test_what_is_held_out_is_scored(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Without a test file a part is held out and scored, by whatever is learned; what was cut is said."""
    path = write_recipe(tmp_path, NO_TEST)
    rows = [chat(f"{'ab'[i % 2]} {i}", "yes" if i % 2 else "no" + "o" * 200 * (i == 10)) for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ["data.test_share=0.3", "data.loss_on=all", "data.max_length=100", "data.too_long=truncate"]
    with pytest.raises(SystemExit):
        run(["train", str(path), *(part for change in changes for part in ("--set", change))])
    lineage = Registry(home).resolve("yes-no").lineage
    held_out = lineage["data"][1]

    assert held_out["file"] == "30% of train.jsonl"
    assert lineage["training"]["examples"] + held_out["rows"] == 40
    assert lineage["metrics"]["yes-no"]["adapter"]["rows"] == held_out["rows"]
    assert lineage["metrics"]["yes-no"]["data"] == held_out["digest"]
    cut = lineage["training"]["examples_cut"]
    assert cut <= 1
    assert (f"{cut} examples were longer than data.max_length" in capsys.readouterr().out) == bool(cut)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "has no examples"),
        (json.dumps({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}), "nothing to learn"),
        (json.dumps({"text": "a", "label": 1}), "not a known format"),
        (json.dumps(chat("q", "a" * 2000)), "2,022 tokens, at most 512 are read"),
    ],
)
def test_data_that_teach_nothing(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture, content: str, told: str
) -> None:
    """Empty files, answers that are all masked, unknown columns: one line, exit code 2, nothing left behind."""
    path = write_recipe(tmp_path)
    (tmp_path / "train.jsonl").write_text(content)
    before = sorted(home.root.rglob("*"))
    with pytest.raises(SystemExit) as exit_info:
        run(["train", str(path)])
    captured = capsys.readouterr()

    assert exit_info.value.code == 2
    assert told in captured.err
    assert len([line for line in captured.err.splitlines() if line.startswith("qhub: ")]) == 1
    assert sorted(home.root.rglob("*")) == before
