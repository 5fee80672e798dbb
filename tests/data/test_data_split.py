"""Data: what is held out, how files are weighted, and datasets of the Hub."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub_local.data.dataset import read_data
from adapterhub_local.errors import NotFound
from adapterhub_local.hub.dataset import choose_files, read_configs
from adapterhub_local.rows.examples import tokenise_data
from tests.chats import chat, learned, recipe_with, write_rows
from tests.hub_server import HubServer, Repo
from tests.hub_server.files import download
from tests.hub_server.repositories import info
from tests.tiny import byte_tokenizer


def test_a_part_is_held_out_by_hash(tmp_path: Path) -> None:
    """What is held out is decided by each prompt alone: other examples, another order and doubles change nothing."""
    rows = [chat(f"question {i}", "yes") for i in range(400)]
    write_rows(tmp_path / "train.jsonl", rows)
    first = read_data(recipe_with(tmp_path, "data.test_share=0.2"))
    write_rows(tmp_path / "train.jsonl", [*rows[::-1], *(chat(f"question {i}", "no") for i in range(400))])
    second = read_data(recipe_with(tmp_path, "data.test_share=0.2"))

    asked = [{c.prompt[0]["content"] for c in part} for part in (first.train, first.test, second.train, second.test)]
    assert 50 < len(first.test) < 110
    assert asked[0] == asked[2]
    assert asked[1] == asked[3]
    assert not asked[0] & asked[1]
    assert [record["role"] for record in first.records] == ["train", "test"]
    assert first.test_digest != second.test_digest


def test_files_are_weighted(tmp_path: Path) -> None:
    """A file of weight 2 is seen twice an epoch, one of 0.5 by half; the held-out part is taken before."""
    write_rows(tmp_path / "a.jsonl", [chat(f"a {i}", "yes") for i in range(10)])
    write_rows(tmp_path / "b.jsonl", [chat(f"b {i}", "yes") for i in range(400)])
    changes = ['data.train=["a.jsonl", "b.jsonl"]', "data.weights=[2, 0.5]", "data.test_share=0"]
    dataset = read_data(recipe_with(tmp_path, *changes))
    names = [c.prompt[0]["content"] for c in dataset.train]

    assert sum(name.startswith("a") for name in names) == 20
    assert 160 < sum(name.startswith("b") for name in names) < 240
    assert read_data(recipe_with(tmp_path, *changes)).train == dataset.train
    assert [(r["file"], r["rows"]) for r in dataset.records] == [("a.jsonl", 10), ("b.jsonl", 400)]


def test_the_held_out_part_is_scored_on_answers(tmp_path: Path) -> None:
    """Where all tokens are learned, held-out examples are still scored on answers."""
    recipe = recipe_with(tmp_path, "data.loss_on=all", "data.test_share=0.3")
    train, test = tokenise_data(read_data(recipe), byte_tokenizer(), recipe.data)

    assert {example.spans[0][0] for example in train.examples} == {1}
    assert test is not None
    assert {text for texts in learned(test) for text in texts} <= {"yes<|im_end|>", "no<|im_end|>"}


def test_test_prompts_that_were_trained_on_are_reported(tmp_path: Path) -> None:
    """Prompts of the test file that are in the training data too are counted and said."""
    write_rows(tmp_path / "train.jsonl", [chat(f"q {i}", "yes") for i in range(8)])
    write_rows(tmp_path / "test.jsonl", [chat(f"q {i}", "no") for i in range(6, 10)])
    notes = read_data(recipe_with(tmp_path, "data.test=test.jsonl")).notes

    assert any(note.startswith("test prompts that are in the training data too: 2 of 4") for note in notes)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A Hub on loopback that has datasets; the client's cache is this test's own."""
    with HubServer() as server:
        for route in [route for route in server.routes if route.function in (download, info)]:
            pattern = route.pattern.replace("/api/models/", "/api/datasets/")
            pattern = pattern.replace("/(?P<repo>", "(?:/datasets)?/(?P<repo>")
            server.routes.append(replace(route, pattern=pattern))
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def test_a_dataset_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    """ORG/NAME is its train and test splits; the record names the commit, so that the run can be repeated."""
    lines = [json.dumps(chat(f"q {i}", "yes")) for i in range(6)]
    hub.repos["org/set"] = repo = Repo()
    commit = repo.commit(
        {
            "README.md": b"---\nconfigs:\n- config_name: default\n  data_files:\n"
            b"  - split: train\n    path: data/tr-*\n"
            b"  - split: test\n    path: data/te.jsonl\n---\n",
            "data/tr-0.jsonl": "\n".join(lines[:3]).encode(),
            "data/tr-1.jsonl": lines[3].encode(),
            "data/te.jsonl": "\n".join(lines[4:]).encode(),
        }
    )
    repo.commit({"data/tr-1.jsonl": None})
    recipe = recipe_with(tmp_path, f"data.train=org/set@{commit}", f"data.test=org/set@{commit}")
    dataset = read_data(recipe)

    assert (len(dataset.train), len(dataset.test)) == (4, 2)
    assert {(record["repo"], record["revision"]) for record in dataset.records} == {("org/set", commit)}
    one = read_data(recipe_with(tmp_path, "data.train=hf://datasets/org/set/data/te.jsonl", "data.test_share=0"))
    assert len(one.train) == 2
    with pytest.raises(NotFound, match=r"org/set has no file x.jsonl .*there is data/te.jsonl, data/tr-0.jsonl"):
        read_data(recipe_with(tmp_path, "data.train=hf://datasets/org/set/x.jsonl"))
    with pytest.raises(NotFound, match="org/none"):
        read_data(recipe_with(tmp_path, "data.train=org/none"))


def test_which_files_of_a_dataset_are_a_split() -> None:
    """The card decides; without one, the name of the split in the path, or the only file there is."""
    names = ["README.md", "data/train-00000.parquet", "data/validation-0.parquet", "extra/constrained.csv"]
    other = "- config_name: b\n  data_files: x.csv\n"
    card = f"---\nconfigs:\n{other}- config_name: a\n  default: true\n  data_files: '*.csv'\n---"

    assert choose_files(names, {}, "train") == ["data/train-00000.parquet"]
    assert choose_files(names, {}, "test") == ["data/validation-0.parquet"]
    assert choose_files(names, read_configs(card), "train") == ["extra/constrained.csv"]
    assert choose_files(["a.json", "b.md"], {}, "train") == ["a.json"]
    assert choose_files(["a.json", "b.json"], {}, "train") == []
    assert read_configs("---\n: [\n---") == {}
