"""The course of the learning rate and the length of a run, as a recipe says them."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from adapterhub_local.errors import BadRecipe
from adapterhub_local.recipe import load_recipe
from adapterhub_local.recipe.derived import learning_rate, num_epochs, num_steps
from adapterhub_local.recipe.schema import SCHEDULES, Train
from tests.recipes import MINIMAL

THEIRS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 200),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_every_step_learns(schedule: str, steps: int, warmup: float, decay: float, least: float) -> None:
    """Under every schedule each step has a rate above zero, up to the peak, which rises first and falls only then."""
    train = Train(schedule=schedule, warmup=warmup, decay=decay, min_rate=least)
    rates = [learning_rate(step, steps, train) for step in range(1, steps + 1)]
    top = rates.index(max(rates))

    assert all(0 < rate <= 1 for rate in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(rate >= least for rate in rates[math.ceil(warmup * steps) :])


@pytest.mark.parametrize("schedule", THEIRS)
@pytest.mark.parametrize("warmup", [0, 0.05, 0.5])
def test_rates_are_the_trainers(schedule: str, warmup: float) -> None:
    """The rates are those of transformers' schedules one step further on, bit for bit."""
    steps, optimizer = 40, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(THEIRS[schedule], optimizer, math.ceil(warmup * steps), steps + 1)
    train = Train(schedule=schedule, warmup=warmup)
    for step in range(1, steps + 1):
        assert learning_rate(step, steps, train) == theirs.lr_lambdas[0](step)


def test_wsd_stays_and_falls() -> None:
    """Warmup, stable, decay: at its peak for most of the run, and down to the least in a line."""
    train = Train(schedule="wsd", warmup=0.1, decay=0.4, min_rate=0.5)
    rates = [round(learning_rate(step, 10, train), 3) for step in range(1, 11)]
    assert rates == [1, 1, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625]


def test_steps_instead_of_epochs() -> None:
    """`max_steps` says how long a run is, whatever the number of examples; the passes follow from it."""
    assert num_steps(100, Train(batch_size=16, epochs=2)) == 14
    assert num_steps(100, Train(batch_size=16, max_steps=3)) == num_steps(1, Train(max_steps=3)) == 3
    assert num_epochs(100, Train(batch_size=16, max_steps=14)) == 2
    assert num_epochs(100, Train(epochs=1.5)) == 1.5


@pytest.mark.parametrize(("written", "set_to"), [("epochs = 2", "max_steps=5"), ("max_steps = 5", "epochs=2")])
def test_what_overrides_a_recipe_says_how_long(written: str, set_to: str, tmp_path: Path) -> None:
    """Steps set on the command line, or by what extends a recipe, take the place of its epochs, and the other way."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "recipe.toml").write_text(f"{MINIMAL}\n[train]\n{written}\n")
    (tmp_path / "more.toml").write_text(f'extends = "recipe.toml"\n[train]\n{set_to.replace("=", " = ")}\n')
    key, value = set_to.split("=")
    for recipe in (
        load_recipe(tmp_path / "recipe.toml", [f"train.{set_to}"]),
        load_recipe(tmp_path / "more.toml"),
    ):
        assert getattr(recipe.train, key) == int(value)
        assert recipe.train.max_steps == (5 if key == "max_steps" else None)
        assert written.split()[0] not in {name.partition(".")[2] for name in recipe.origins}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("train.epochs=2", "train.max_steps=5"), "both say how long: leave one out"),
        (("train.schedule=constant", "train.min_rate=0.1"), "is for schedules that fall"),
        (("train.schedule=wsd", "train.warmup=0.5", "train.decay=0.6"), "together 1 at most"),
        (("train.schedule=linear", "train.decay=0.1"), "is for train.schedule = 'wsd'"),
    ],
)
def test_what_does_not_go_together(changes: tuple[str, ...], told: str, tmp_path: Path) -> None:
    """Keys that contradict each other, or have no effect, are refused with what to do."""
    (tmp_path / "recipe.toml").write_text(MINIMAL)
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(BadRecipe, match=told):
        load_recipe(tmp_path / "recipe.toml", changes)
