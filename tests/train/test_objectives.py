"""Preferences: losses as their papers have them, exact rows, one base as its own reference, and what a run keeps."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.main import run
from adapterhub_local.data.dataset import read_data
from adapterhub_local.errors import BadData, BadRecipe
from adapterhub_local.recipe import Recipe, load_recipe
from adapterhub_local.recipe.objectives import OBJECTIVES, Preference
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.judged import Judged, tokenise_items
from adapterhub_local.settings import Home
from adapterhub_local.train.adapter import factors_of, with_adapter
from adapterhub_local.train.objectives import make_objective
from adapterhub_local.train.objectives.losses import PAIRED, Pairs, kto
from adapterhub_local.train.train import train
from tests.chats import RECIPE
from tests.tiny import byte_tokenizer

PREFERENCES = [
    {"prompt": f"Which is it, {'ab'[i % 2]}{i}?", "chosen": "yes" * (i % 3 + 1), "rejected": "no, never" * (i % 2 + 1)}
    for i in range(12)
]


def recipe_of(folder: Path, rows: list[dict], *changes: str, objective: str = "dpo") -> Recipe:
    """A recipe of this objective over these rows, four of which are held out."""
    for name, part in (("train", rows[:-4]), ("test", rows[-4:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "recipe.toml").write_text(RECIPE)
    return load_recipe(folder / "recipe.toml", [f"train.objective={objective}", *changes])


def judged_rows(rows: list[dict]) -> list[dict]:
    """Each answer of the pairs by itself."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]


def rows_of(objective: str) -> list[dict]:
    return judged_rows(PREFERENCES) if objective == "kto" else PREFERENCES


def items_of(recipe: Recipe) -> list[Judged]:
    shape = OBJECTIVES[recipe.train.objective].shape
    found, _ = tokenise_items(read_data(recipe), byte_tokenizer(), recipe.data, shape, recipe.train.batch_size)
    return list(found.items)  # type: ignore[arg-type]


def log_prob(model, example: Example) -> torch.Tensor:
    """The log-probability of an example's answer, by one plain pass over it alone."""
    ids = torch.tensor([example.ids])
    (start, end) = example.spans[0]
    logits = model(input_ids=ids).logits[0].float()
    return log_softmax(logits[start - 1 : end - 1], -1)[range(end - start), ids[0, start:end]].sum()


# -- the losses ------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("name", "beta", "wanted"),
    [
        # of log-probabilities -6 and -9 (3 and 2 tokens), -7 and -8 under the reference, by hand
        ("dpo", 0.1, -math.log(sigmoid(0.1 * ((-6 + 7) - (-9 + 8))))),
        ("ipo", 0.1, ((-6 + 7) / 3 - (-9 + 8) / 2 - 1 / 0.2) ** 2),
        ("simpo", 2.0, -math.log(sigmoid(2.0 * (-6 / 3 + 9 / 2) - 0.5))),
        (
            "orpo",
            0.1,
            -0.1
            * math.log(
                sigmoid(
                    math.log(math.exp(-2) / (1 - math.exp(-2))) - math.log(math.exp(-4.5) / (1 - math.exp(-4.5)))
                )
            ),
        ),
    ],
)  # fmt: skip
def test_a_loss_is_its_papers(name: str, beta: float, wanted: float) -> None:
    """Each loss of a pair has the value that its paper's equation has."""
    pairs = Pairs(torch.tensor([[-6.0, -9.0]]), torch.tensor([[3, 2]]), torch.tensor([[-7.0, -8.0]]))
    assert PAIRED[name](pairs, beta, Preference()).tolist() == pytest.approx([wanted], rel=1e-5)


def test_smoothed_labels() -> None:
    """With label smoothing e a pair is the wrong way round with probability e; without it nothing changes."""
    pairs = Pairs(torch.tensor([[-6.0, -9.0]]), torch.tensor([[3, 2]]), torch.tensor([[-7.0, -8.0]]))
    turned = Pairs(pairs.log_probs.flip(1), pairs.lengths.flip(1), torch.tensor([[-8.0, -7.0]]))
    plain, other = (PAIRED["dpo"](given, 0.1, Preference()) for given in (pairs, turned))
    mixed = PAIRED["dpo"](pairs, 0.1, Preference(label_smoothing=0.25))

    assert torch.allclose(mixed, 0.75 * plain + 0.25 * other)


def test_kto_is_its_papers() -> None:
    """A good answer's loss falls with its reward, a bad one's rises, both measured from the divergence."""
    ratios, good = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    losses = kto(ratios, good, torch.tensor(0.5), 0.1, Preference(desirable_weight=2.0, undesirable_weight=3.0))
    wanted = [2 * (1 - sigmoid(0.1 * 1.5)), 3 * (1 - sigmoid(-0.1 * 1.5))]

    assert losses.tolist() == pytest.approx(wanted)


def test_an_answer_that_is_certain() -> None:
    """ORPO's odds of a probability of one are finite, and so is their gradient."""
    probs = torch.tensor([[0.0, -5.0]], requires_grad=True)
    PAIRED["orpo"](Pairs(probs, torch.tensor([[2, 2]]), None), 0.1, Preference()).sum().backward()

    assert torch.isfinite(probs.grad).all()  # type: ignore[arg-type]


# -- rows and reference ----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in ("sft", "grpo")])
@pytest.mark.parametrize("cut", ["train.packed_tokens=400", "train.packed_tokens=0", "train.micro_batch_size=1"])
def test_a_step_is_what_plain_passes_give(tiny_base: BaseInfo, tmp_path: Path, objective: str, cut: str) -> None:
    """However a step is cut, its loss and its gradient are those of each answer computed by itself."""
    recipe = recipe_of(tmp_path, rows_of(objective), cut, objective=objective)
    items = items_of(recipe)[: recipe.train.batch_size]
    model = with_adapter(load_base(tiny_base), recipe)
    goal = make_objective(model, items, recipe)
    torch.manual_seed(1)
    factors = factors_of(model)
    for factor in factors.values():
        factor.data += 0.05 * torch.randn_like(factor)
    rows = goal.rows(items)
    step = goal.begin(rows, rows, lambda tensor: tensor)
    total = sum(goal.loss(row, step)[0] for row in rows)
    found = torch.autograd.grad(total, list(factors.values()))

    with torch.no_grad(), model.disable_adapter():
        before = torch.stack([torch.stack([log_prob(model, part) for part in item.parts]) for item in items])
    now = torch.stack([torch.stack([log_prob(model, part) for part in item.parts]) for item in items])
    lengths = torch.tensor([[part.num_labels for part in item.parts] for item in items])
    beta = OBJECTIVES[objective].beta
    if objective == "kto":
        good = torch.tensor([item.is_good for item in items])
        moved = (now - before)[:, 1].mean().clamp(min=0).detach()
        wanted = kto((now - before)[:, 0], good, moved, beta, recipe.preference).mean()
    else:
        wanted = PAIRED[objective](Pairs(now, lengths, before), beta, recipe.preference).mean()
        if objective == "orpo":
            wanted = wanted - now[:, 0].sum() / lengths[:, 0].sum()

    assert len(rows) < 8 if cut == "train.packed_tokens=400" else len(rows) == 8
    assert total.item() == pytest.approx(wanted.item(), abs=1e-4)
    for one, other in zip(found, torch.autograd.grad(wanted, list(factors.values())), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_prompts_are_computed_once(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """Chosen and rejected share the tokens of their prompt, several pairs share a row."""
    recipe = recipe_of(tmp_path, PREFERENCES, "train.packed_tokens=1000")
    items = items_of(recipe)
    (row,) = make_objective(with_adapter(load_base(tiny_base), recipe), items, recipe).rows(items)
    prompts = sum(item.parts[0].spans[0][0] - 1 for item in items)

    assert len(row.items) == 8
    assert row.num_tokens == sum(len(part.ids) for item in items for part in item.parts) - prompts


def test_the_reference_is_the_start(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """The first loss of dpo is log 2 whether the run starts from the base or trains a version on; a reference to the
    base is another loss."""
    first = train(recipe_of(tmp_path, PREFERENCES), home)
    losses = {}
    for reference in ("start", "base"):
        changes = (f"adapter.from={first}", f"preference.reference={reference}", "train.epochs=1")
        again = train(recipe_of(tmp_path, PREFERENCES, *changes), home)
        losses[reference] = again.lineage["training"]["curve"][0][1]

    assert first.lineage["training"]["curve"][0][1] == pytest.approx(math.log(2), abs=1e-4)
    assert losses["start"] == pytest.approx(math.log(2), abs=1e-4)
    assert losses["base"] < math.log(2) - 0.01


# -- a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in ("sft", "grpo")])
def test_a_run_learns_the_preference(tiny_base: BaseInfo, home: Home, tmp_path: Path, objective: str) -> None:
    """Held-out accuracy and margin rise over the base's; the version keeps objective, parameters and rewards."""
    recipe = recipe_of(tmp_path, rows_of(objective), "train.epochs=8", objective=objective)
    version = train(recipe, home)
    scores = version.lineage["metrics"]["yes-no"]
    kept = version.lineage["recipe"]["resolved"]

    assert kept["train"]["objective"] == objective
    assert kept["preference"]["label_smoothing"] == 0.0
    assert scores["adapter"]["reward_accuracy"] >= 0.5
    if objective == "kto":
        assert scores["adapter"]["rewards_chosen"] > scores["adapter"]["rewards_rejected"]
    else:
        assert scores["adapter"]["accuracy"] == 1.0
        assert scores["adapter"]["margin"] > scores["base"]["margin"]
        assert scores["adapter"]["reward_margin"] > 0
    assert train(recipe, home).content_digest == version.content_digest


def test_a_run_tells_its_rewards(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress, log and summary have rewards and accuracy; `runs show` has the held-out loss of the objective."""
    recipe_of(tmp_path, PREFERENCES)
    path = str(tmp_path / "recipe.toml")
    with pytest.raises(SystemExit) as ended:
        run(["train", path, "--set", "train.objective=dpo", "--set", "train.eval_every=1"])
    captured = capsys.readouterr()
    (log,) = home.runs.glob("*/log.jsonl")
    entries = [json.loads(line) for line in log.read_text().splitlines()]

    assert ended.value.code == 0
    assert "held-out examples: accuracy" in captured.out
    assert "margin" in captured.out
    steps = [entry for entry in entries if "loss" in entry]
    assert steps
    for entry in steps:
        assert {"rewards_chosen", "rewards_rejected", "reward_accuracy", "reward_margin"} <= entry.keys()
    assert any("eval_reward_accuracy" in entry for entry in entries)


def test_eval_scores_pairs(tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`qhub eval` on a file of pairs prints accuracy, margin and the win rate over the base, and keeps them."""
    version = train(recipe_of(tmp_path, PREFERENCES, "train.epochs=8"), home)
    path = str(tmp_path / "test.jsonl")
    with pytest.raises(SystemExit) as ended:
        run(["eval", "yes-no", "--data", path, "--against", "base"])
    assert ended.value.code == 0
    assert "yes-no@1 prefers the chosen answer more than base in 100.0%" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(["eval", "yes-no", "--data", path, "--against", "base", "--json"])
    scores = json.loads(capsys.readouterr().out)["scores"]
    for who, shown in (("adapter", "yes-no@1"), ("base", "tiny")):
        for name, value in version.lineage["metrics"]["yes-no"][who].items():
            if name in ("rows", "loss", "accuracy", "margin"):
                assert scores[shown][name] == pytest.approx(value, abs=1e-3)
    with pytest.raises(SystemExit) as ended:
        run(["eval", "yes-no", "--data", path, "--json-valid"])
    assert ended.value.code == 2
    assert "pairs of answers" in capsys.readouterr().err


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["preference.beta=0.2"], "preference.beta is for train.objective = dpo, ipo, simpo, orpo, kto, not 'sft'"),
        (["train.objective=dpo", "preference.margin=1"], "preference.margin is for train.objective = simpo, not 'dpo'"),
        (["train.objective=orpo", "preference.reference=base"], "preference.reference is for train.objective = dpo"),
        (["train.objective=dpo", "data.format=messages"], "data.format = 'messages' is not for 'dpo'"),
        (["data.format=preference"], "data.format = 'preference' is not for 'sft'"),
        (["train.objective=dpo", "data.loss_on=all"], "data.loss_on = 'all' is for 'sft'"),
        (["train.objective=dpo", "data.prompt={prompt}", "data.answer={chosen}"], "makes one answer a row"),
        (["reward.length=3"], "reward.length is for train.objective = grpo, not 'sft'"),
        (["train.objective=grpo"], "'grpo' needs a reward: give one of reward.exact_match"),
        (["train.objective=grpo", "reward.regex='('"], "is not a pattern of RE2: missing ): ("),
        (["train.objective=grpo", "reward.exact_match=0"], "reward.exact_match = 0: every answer would be worth"),
        (["train.objective=grpo", "reward.length=3", "reward.length_weight=0"], "reward.length_weight = 0: every"),
        (
            ["train.objective=grpo", "reward.exact_match=1", "reward.regex_weight=2"],
            "reward.regex_weight is for reward.regex, which is not given",
        ),
        (["train.objective=grpo", "reward.json_schema='{'"], "is not JSON"),
        (["train.objective=ppo"], "must be one of sft, dpo"),
        (["train.objective=dpo", "preference.label_smoothing=0.5"], "must be from 0"),
    ],
)
def test_keys_that_do_not_go_together(tmp_path: Path, changes: list[str], message: str) -> None:
    """A key that the objective does not read is refused with those that read it."""
    recipe_of(tmp_path, PREFERENCES)
    with pytest.raises(BadRecipe) as told:
        load_recipe(tmp_path / "recipe.toml", changes)
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("objective", "rows", "message"),
    [
        ("sft", PREFERENCES, "set train.objective = 'dpo' to learn from both"),
        ("dpo", judged_rows(PREFERENCES), "train.objective = 'kto' learns from answers with a label"),
        (
            "kto",
            [{"prompt": "a", "completion": "b"}] * 8,
            "chosen and rejected, or an answer and label",
        ),
        ("kto", [{"prompt": "a", "completion": "b", "label": "good"}] * 8, "label must be true"),
        ("dpo", [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 8, "are the same answer"),
        (
            "dpo",
            [{"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x"]}] * 8,
            "images is not empty",
        ),
        ("dpo", [{"chosen": "a b", "rejected": "c d"}] * 8, "begin with nothing in common"),
    ],
)
def test_rows_of_another_shape(tmp_path: Path, objective: str, rows: list[dict], message: str) -> None:
    """Rows that an objective cannot learn from are refused with what it needs, or with the objective they are for."""
    with pytest.raises(BadData, match=message.replace("(", r"\(")):
        read_data(recipe_of(tmp_path, rows, objective=objective))
