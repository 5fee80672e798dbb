"""The Python API: what the verbs do, as functions, each run once on a tiny base."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from adapterhub_local import (
    QhubError,
    Recipe,
    Registry,
    create_app,
    evaluate_adapters,
    load_recipe,
    merge_adapters,
    pull_adapter,
    push_adapter,
    train_recipe,
)
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.errors import InputError, NotFound
from adapterhub_local.settings import Home
from tests.chats import write_chats, write_recipe
from tests.hub_server import HubServer


def test_from_recipe_to_answers(tiny_base: BaseInfo, registry: Registry, tmp_path: Path, hub: HubServer) -> None:
    """Train, evaluate, merge, push, pull and serve are one call each, in one home, and agree with each other."""
    first = train_recipe(write_recipe(tmp_path), overrides=["output.name='one'"])
    recipe = load_recipe(tmp_path / "recipe.toml", ["output.name='two'", "train.seed=3"])
    assert isinstance(recipe, Recipe)
    second = train_recipe(recipe)
    assert [str(version) for version in (first, second)] == ["one@1", "two@1"]

    held_out = write_chats(tmp_path / "more.jsonl", 6, offset=2)
    done = evaluate_adapters(["one", "two@1"], held_out, against=["base"], limit=4)
    assert set(done.scores) == {"one", "two@1", "tiny"}
    assert registry.metrics(first)["more"] == done.kept["one"]
    assert done.kept["one"]["base"]["difference"]["loss"]["value"] == pytest.approx(
        done.scores["one"].loss - done.scores["tiny"].loss, abs=1e-3
    )

    foreseen = merge_adapters(["one", "two"], [0.5, 0.5], dry_run=True, rank=4)
    merged = merge_adapters(["one", "two"], [0.5, 0.5], name="both", alias="prod", rank=4)
    assert foreseen.report == merged.report
    assert registry.resolve("both@prod") == merged.version
    file = merge_adapters([first.path, "two"], [1, -1], output=tmp_path / "m.safetensors", method="ties", density=0.5)
    assert Path(file.path or "").is_file()
    assert file.report.to_json()["parameters"]["density"] == 0.5

    assert push_adapter("both@1", "me/both", endpoint=hub.endpoint, token=hub.token).tag == "v1"
    pulled = pull_adapter("me/both", name="again", endpoint=hub.endpoint, token=hub.token)
    assert pulled.version.content_digest == registry.resolve("both@prod").content_digest

    with TestClient(create_app(max_rows=2, max_length=64, max_tokens=4)) as client:
        models = {model["id"] for model in client.get("/v1/models").json()["data"]}
        assert {"tiny", "one", "two", "both"} <= models
        answer = client.post("/v1/completions", json={"model": "both@prod", "prompt": "ab", "max_tokens": 2})
        assert answer.status_code == 200, answer.text


def test_mistakes_name_the_way_out(home: Home, tmp_path: Path) -> None:
    """What is not there, or does not fit together, is a QhubError before anything is loaded or written."""
    with pytest.raises(NotFound, match="there is no recipe"):
        train_recipe(tmp_path / "none.toml")
    for given in ({}, {"name": "x", "dry_run": True}):
        with pytest.raises(InputError, match="one of name, output and dry_run"):
            merge_adapters(["a", "b"], [1, 1], **given)
    with pytest.raises(InputError, match="exclude each other"):
        merge_adapters(["a", "b"], [1, 1], name="x", output="y")
    with pytest.raises(NotFound, match="nobody"):
        evaluate_adapters("nobody", tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="there is no option max_row: known are"):
        create_app(max_row=1)
    with pytest.raises(QhubError):
        push_adapter("nobody", "someone/x")
    assert not home.blobs.exists()
