"""`strategy = "auto"`: what is given stays, what is open is chosen with its reason, and the choice fits the device."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.cli.plan import command
from adapterhub_local.errors import InputError
from adapterhub_local.plan.auto import USED, choose, settle
from adapterhub_local.plan.device import find_device
from adapterhub_local.plan.memory import estimate
from adapterhub_local.plan.run_plan import pass_of
from adapterhub_local.plan.shape import read_shape
from adapterhub_local.recipe import Recipe, load_recipe
from adapterhub_local.rows.examples import Example
from adapterhub_local.settings import Home
from adapterhub_local.train.train import train
from tests.chats import write_recipe
from tests.plan.test_plan import LLAMA_8B

OPEN = """
[base]
name = "tiny"
[data]
train = "train.jsonl"
test = "test.jsonl"
[train]
strategy = "auto"
[output]
name = "yes-no"
"""


def examples(count: int, length: int, answer: int) -> list[Example]:
    return [Example(tuple(range(at, at + length)), ((length - answer, length),)) for at in range(count)]


def chosen(recipe: Recipe, size: str, data: list[Example]) -> dict:
    settled, _, choices = choose(recipe, read_shape(LLAMA_8B), find_device(size), data, True)
    assert settled.train.strategy == "manual"
    for choice in choices:
        table, _, key = choice.key.partition(".")
        assert getattr(getattr(settled, table), key) == choice.value
        assert choice.key not in recipe.origins
        assert choice.reason
    return {choice.key: choice.value for choice in choices}


def test_less_memory_takes_smaller_ways(tmp_path: Path) -> None:
    """A large card keeps all activations, a smaller one computes them again, a too small one is refused."""
    recipe = load_recipe(write_recipe(tmp_path, OPEN))
    data = examples(400, 900, 300)
    large, small = chosen(recipe, "80GB", data), chosen(recipe, "12GB", data)

    assert (large["train.packed_tokens"], large["train.activation_checkpointing"]) == (4096, False)
    assert small["train.activation_checkpointing"]
    assert (large["train.optimizer"], small["train.optimizer"]) == ("adamw", "adamw")
    assert chosen(recipe, "7GB", data)["train.optimizer"] == "paged_adamw_8bit"
    assert chosen(recipe, "8GB", data)["train.activation_checkpointing"] == "offload"
    with pytest.raises(InputError, match="use a smaller base, shorter examples"):
        chosen(recipe, "6GB", data)
    given = load_recipe(write_recipe(tmp_path, OPEN), ["train.activation_checkpointing=offload"])
    assert "train.activation_checkpointing" not in chosen(given, "80GB", data)


@pytest.mark.parametrize("size", ["9GB", "10GB", "12GB", "16GB", "24GB", "48GB"])
def test_a_choice_fits(tmp_path: Path, size: str) -> None:
    """Whatever is chosen takes no more than the share of the device it may take."""
    recipe, shape, device = load_recipe(write_recipe(tmp_path, OPEN)), read_shape(LLAMA_8B), find_device(size)
    settled, rows, _ = choose(recipe, shape, device, examples(64, 500, 100), True)
    total = estimate(shape, pass_of(settled, device, rows), settled.train.optimizer, device.kind).total

    assert total <= USED * device.memory


def test_what_is_given_stays(tmp_path: Path) -> None:
    """Keys of the recipe and of --set are kept, and their neighbours chosen around them."""
    path = write_recipe(tmp_path, OPEN)
    changes = ["adapter.rank=4", "train.packed_tokens=256", "train.activation_checkpointing=true"]
    recipe = load_recipe(path, changes)
    settled, _, choices = choose(recipe, read_shape(LLAMA_8B), find_device("80GB"), examples(64, 100, 10), True)

    assert (settled.adapter.rank, settled.train.packed_tokens) == (4, 256)
    assert settled.train.activation_checkpointing
    assert settled.adapter.alpha == 4 * 32 / 16
    assert "train.batch_size" in {choice.key for choice in choices}


def test_rank_and_batch_follow_the_data(tmp_path: Path) -> None:
    """Much to learn raises the rank, few examples lower the batch, and each says so."""
    recipe, shape, device = load_recipe(write_recipe(tmp_path, OPEN)), read_shape(LLAMA_8B), find_device("80GB")
    few, _, _ = choose(recipe, shape, device, examples(20, 60, 5), True)
    small = replace(shape, layers=1, hidden=64, heads=1, kv_heads=1, linears=shape.linears[:1])
    many, _, choices = choose(recipe, small, device, examples(600, 900, 800), True)

    assert few.train.batch_size == 1
    assert few.adapter.rank == 16
    assert many.adapter.rank > 16
    assert any("can teach more" in choice.reason for choice in choices)


def test_a_manual_recipe_is_left_alone(tmp_path: Path, home: Home) -> None:
    """Without the strategy nothing is chosen, and no base or data are read."""
    recipe = load_recipe(write_recipe(tmp_path))

    assert settle(recipe, home) == (recipe, [])


def test_a_run_keeps_what_was_chosen(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """The version holds the resolved recipe and the reasons; the resolved recipe by hand gives the same adapter."""
    path = write_recipe(tmp_path, OPEN)
    version = train(load_recipe(path), home)
    lineage = version.lineage
    table = {choice["key"]: choice["value"] for choice in lineage["strategy"]}
    by_hand = [f"{key}={json.dumps(value)}" for key, value in table.items()]
    again = train(load_recipe(path, ["train.strategy=manual", *by_hand]), home)

    assert lineage["recipe"]["resolved"]["train"]["strategy"] == "manual"
    assert lineage["recipe"]["resolved"]["adapter"]["rank"] == table["adapter.rank"] == 8
    assert 'strategy = "auto"' in lineage["recipe"]["text"]
    assert again.content_digest == version.content_digest


def test_the_plan_says_why(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """`qhub plan` prints each choice and its reason before what the run takes."""
    from click.testing import CliRunner

    path = str(write_recipe(tmp_path, OPEN))
    done = CliRunner().invoke(command, [path, "--gpu", "8GB"], standalone_mode=False)

    assert done.return_value == 0
    assert "train.optimizer = adamw: there is room for its states" in done.output
    assert "adapter.rank = 8: for a model of" in done.output
