"""GRPO: drawn answers, what they are worth, one prompt for all of them, and rewards that rise."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import LoadedBase, load_base
from adapterhub_local.errors import InputError, QhubError, Stopped
from adapterhub_local.evaluate.rewards import worth
from adapterhub_local.recipe import Recipe, load_recipe
from adapterhub_local.recipe.reward import Reward
from adapterhub_local.rows.examples import Example, read_chats, tokenise
from adapterhub_local.settings import Home
from adapterhub_local.train.adapter import factors_of, with_adapter
from adapterhub_local.train.check import check_processes, check_run
from adapterhub_local.train.objectives import make_objective
from adapterhub_local.train.past_runs import checkpoints, list_runs, step_of
from adapterhub_local.train.train import train
from tests.chats import RECIPE, write_chats
from tests.train.test_objectives import log_prob
from tests.train.test_train_runs import stop_at


def drawing(folder: Path, *changes: str) -> Recipe:
    """A recipe whose model draws short answers, rewarded for a small letter in them."""
    (folder / "recipe.toml").write_text(RECIPE)
    write_chats(folder / "train.jsonl", 32)
    write_chats(folder / "test.jsonl", 4, offset=1)
    short = ("reward.max_tokens=6", "reward.samples=8", "train.batch_size=4", "train.objective=grpo")
    return load_recipe(folder / "recipe.toml", [*short, "reward.regex=[a-z]", *changes])


def test_rewards_rise(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """Answers that are rewarded become likelier; the version keeps the reward of base and adapter, and a run that is
    done again is the same."""
    recipe = drawing(tmp_path, "train.epochs=2")
    version = train(recipe, home)
    (log,) = home.runs.glob("*/log.jsonl")
    rewards = [json.loads(line)["reward"] for line in log.read_text().splitlines()]
    scores = version.lineage["metrics"]["yes-no"]

    assert sum(rewards[-6:]) > sum(rewards[:6]) + 1
    assert scores["adapter"]["reward"] > scores["base"]["reward"]
    assert train(recipe, home).content_digest == version.content_digest


def test_a_run_that_is_resumed_draws_the_same(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped and resumed, it draws the answers that it would have drawn, and ends with the same adapter."""
    recipe = drawing(tmp_path, "train.max_steps=5", "train.eval_every=2")
    whole = train(recipe, home)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped, match="step 3 of 5"):
            train(recipe, home)
    assert train(recipe, home, resume=True).content_digest == whole.content_digest


@pytest.mark.parametrize(("tokens", "rows_a_step"), [(1024, 1), (300, 2), (0, 4)])
def test_a_step_of_drawn_answers(tiny_base: BaseInfo, tmp_path: Path, tokens: int, rows_a_step: int) -> None:
    """The gradient of a step is that of -A log pi a token over each answer alone, A being its reward in its group,
    however many prompts share a row."""
    recipe = drawing(tmp_path, f"train.packed_tokens={tokens}")
    base = load_base(tiny_base)
    examples = tokenise(read_chats(recipe.data.train), base.tokenizer, 512)[:4]
    model = with_adapter(base, recipe)
    goal = make_objective(model, examples, recipe, tokenizer=base.tokenizer, info=base.info)
    torch.manual_seed(3)
    rows = goal.rows(examples)
    step = goal.begin(rows, rows, lambda tensor: tensor)
    factors = list(factors_of(model).values())
    losses, told = zip(*(goal.loss(row, step) for row in rows), strict=True)
    found = torch.autograd.grad(sum(losses), factors)
    wanted = torch.zeros(())
    answered = [drawn for row in step.drawn.values() for drawn in row]
    for drawn in answered:
        group = drawn.rewards
        for answer, reward in zip(drawn.answers, group, strict=True):
            better = (reward - group.mean()) / (group.std(correction=0) + 1e-4)
            wanted = wanted - better * log_prob(model, answer) / step.tokens

    assert step.tokens == sum(answer.num_labels for drawn in answered for answer in drawn.answers)
    assert any(0 < drawn.rewards.mean() < 1 for drawn in answered)
    assert len(rows) == rows_a_step
    assert float(sum(losses).detach()) == pytest.approx(-float(sum(told)[0]), abs=1e-6), (
        "a loss is less the mean reward"
    )
    for one, other in zip(found, torch.autograd.grad(wanted, factors), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def trained(base: LoadedBase, recipe: Recipe) -> Any:
    """A PEFT model over the base whose factors are not at their start."""
    model = with_adapter(base, recipe)
    torch.manual_seed(5)
    for factor in factors_of(model).values():
        torch.nn.init.normal_(factor, std=0.2)
    return model


def objective_of(base: LoadedBase, recipe: Recipe, *, by_engine: bool) -> tuple[Any, Any, list[Example]]:
    """The objective of a recipe, its model and its examples, whose answers the engine draws, or transformers."""
    examples = tokenise(read_chats(recipe.data.train), base.tokenizer, 512)[:6]
    model = trained(base, recipe)
    info = base.info if by_engine else None
    goal = make_objective(model, examples, recipe, tokenizer=base.tokenizer, info=info)
    assert (goal.drawer is not None) == by_engine
    return goal, model, examples


@pytest.mark.parametrize("change", ["adapter.rank=4", "adapter.rslora=true", "adapter.rank_pattern={ q_proj = 2 }"])
def test_the_engine_writes_what_the_model_does(tiny_base: BaseInfo, tmp_path: Path, change: str) -> None:
    """Greedy answers are those of transformers, as the factors are at that moment, and the trained model stays what it
    was: not a tensor of the base is there twice."""
    recipe = drawing(tmp_path, change, "adapter.target_modules=all-linear", "reward.max_tokens=12")
    goal, model, examples = objective_of(load_base(tiny_base), recipe, by_engine=True)
    plain, other, _ = objective_of(load_base(tiny_base), recipe, by_engine=False)
    for scale in (1.0, -0.5):
        for one in (model, other):
            for factor in factors_of(one).values():
                factor.data.mul_(scale)
        wanted = [each.answers[0].ids for each in plain._draw(examples, 1)]
        assert [each.answers[0].ids for each in goal._draw(examples, 1)] == wanted
    held = {tensor.data_ptr() for tensor in model.get_base_model().parameters()}
    twin = goal.drawer.engine.runner.model
    assert {tensor.data_ptr() for tensor in twin.parameters()} <= held
    assert not any("lora" in name for name, _ in twin.named_parameters())
    assert not model.get_base_model().get_input_embeddings().weight.requires_grad


def test_drawn_answers_have_the_models_probabilities(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """Of many first tokens each is drawn as often as the trained model at that temperature says."""
    recipe = drawing(tmp_path, "reward.max_tokens=1", "reward.samples=256", "reward.temperature=0.7")
    goal, model, examples = objective_of(load_base(tiny_base), recipe, by_engine=True)
    prompt = examples[0].ids[: examples[0].spans[-1][0]]
    counts = torch.zeros(model.get_input_embeddings().weight.shape[0])
    for _ in range(6):
        for answer in goal.drawer.draw([prompt], goal._how(256))[0]:
            counts[answer[0]] += 1
    with torch.no_grad():
        wanted = (model(input_ids=torch.tensor([prompt])).logits[0, -1].float() / 0.7).softmax(-1)
    likely = wanted > 0.01
    deviation = (wanted * (1 - wanted) / counts.sum()).sqrt()
    assert ((counts / counts.sum() - wanted).abs() < 5 * deviation)[likely].all()
    assert likely.sum() > 10
    assert (counts[~likely].sum() / counts.sum() - wanted[~likely].sum()).abs() < 0.1


def test_answers_end_with_the_context(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """A prompt that leaves less room than `reward.max_tokens` is answered as far as the context goes."""
    recipe = drawing(tmp_path, "reward.max_tokens=490", "reward.samples=2")
    goal, _, examples = objective_of(load_base(tiny_base), recipe, by_engine=True)
    goal.ends = ()
    prompt = examples[0].ids[: examples[0].spans[-1][0]]
    room = tiny_base.max_length - len(prompt)
    assert room < 490
    assert [len(answer) for answer in goal.drawer.draw([prompt], goal._how(2))[0]] == [room, room]


def test_what_the_engine_cannot_compute(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """DoRA's answers are drawn by transformers, and the run says so."""
    version = train(drawing(tmp_path, "adapter.dora=true", "train.max_steps=1"), home)
    assert any("drawn by transformers" in note for note in version.lineage["notes"])
    plain = train(drawing(tmp_path, "train.max_steps=1"), home)
    assert not any("drawn" in note for note in plain.lineage["notes"])


@pytest.mark.parametrize(
    ("change", "count", "reason"),
    [
        ("reward.max_tokens=4000", 1, "reward.max_tokens = 4000: base 'tiny' takes"),
        ("reward.max_tokens=6", 2, "train.objective: grpo draws its answers in one process"),
    ],
)
def test_what_cannot_be_drawn_is_refused_first(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, change: str, count: int, reason: str
) -> None:
    """Answers longer than the context, and several processes: before the base is loaded, by the key of the recipe."""
    recipe = drawing(tmp_path, change)

    def check() -> None:
        check_run(recipe, home)
        check_processes(recipe, count, shard_base=False)

    with pytest.raises(InputError) as caught:
        check()
    assert reason in str(caught.value)


def test_nothing_to_learn_is_said_as_it_is(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """Where every answer is worth the same, a higher rate would not help; and resumed, it takes no step more."""
    recipe = drawing(tmp_path, "train.max_steps=3", "reward.regex=[0]{99}")
    for resume in (False, True, True):
        with pytest.raises(QhubError, match="all answers to a prompt were worth the same"):
            train(recipe, home, resume=resume)
        assert [step_of(each) for each in checkpoints(list_runs(home)[-1].folder)] == [3]


def test_answers_that_no_draw_can_reach(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """A limit below the shortest answer of the data is reported before the run, and nothing is left behind."""
    recipe = drawing(tmp_path, "reward.max_tokens=1")
    exact = replace(recipe, reward=replace(recipe.reward, regex=None, exact_match=1.0))
    with pytest.raises(InputError, match=r"reward.max_tokens = 1: the shortest answer of the data has 2 tokens"):
        train(exact, home)
    assert not list(home.runs.glob("*/log.jsonl"))


@pytest.mark.parametrize(
    ("declared", "answer", "value"),
    [
        ({"exact_match": 2.0}, " yes\n", 2.0),
        ({"exact_match": 2.0}, "no", 0.0),
        ({"regex": "^y", "regex_weight": 0.5}, "yes", 0.5),
        ({"json_schema": '{"type": "object", "required": ["a"]}'}, '{"a": 1}', 1.0),
        ({"json_schema": '{"type": "object", "required": ["a"]}'}, '{"b": 1}', 0.0),
        ({"json_schema": '{"type": "object"}'}, "{", 0.0),
        ({"length": 4}, "yes", 1.0),
        ({"length": 3}, "yes", 0.0),
        ({"exact_match": 1.0, "regex": "s"}, "yes", 2.0),
    ],
)
def test_what_an_answer_is_worth(declared: dict, answer: str, value: float) -> None:
    """Each declared reward counts with its weight; `length` only for an answer that ends in time."""
    assert worth(Reward(**declared))(answer, "yes", 4, True, "Is it?") == value
