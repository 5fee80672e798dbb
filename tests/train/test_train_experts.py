"""Training on a mixture of experts: on attention, and on the experts; plain PEFT over transformers' model agrees."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy

from adapterhub_local.base.load import load_base
from adapterhub_local.recipe import load_recipe
from adapterhub_local.rows.example import Example
from adapterhub_local.rows.examples import read_chats, tokenise
from adapterhub_local.rows.packing import pack
from adapterhub_local.settings import Home
from adapterhub_local.train.adapter import factors_of, with_adapter
from adapterhub_local.train.loss import answer_loss
from adapterhub_local.train.train import train
from tests.chats import write_recipe
from tests.mixtures import ALIKE, MIXTURES, add_mixture, dequantised_model

ATTENTION = "adapter.target_modules=attention"


def plain_loss(model, examples: list[Example]) -> torch.Tensor:
    """The mean loss of the examples' answers, each in a forward pass of its own, without code of ours."""
    losses = []
    for example in examples:
        ids = torch.tensor([example.ids])
        logits = model(input_ids=ids).logits[0]
        for start, end in example.spans:
            losses.append(cross_entropy(logits[start - 1 : end - 1], ids[0, start:end], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("name", MIXTURES)
def test_loss_and_gradients_are_those_of_peft(name: str, home: Home, tmp_path: Path) -> None:
    """On attention, packed rows over 4-bit experts have the loss and the gradients of PEFT over dequantised ones."""
    info = add_mixture(name, home, tmp_path / "model")
    recipe = load_recipe(write_recipe(tmp_path), [ATTENTION])
    base = load_base(info)
    examples = tokenise(read_chats(recipe.data.train, 4), base.tokenizer, 512)
    settings = LoraConfig(
        r=recipe.adapter.rank, lora_alpha=recipe.adapter.alpha, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )  # fmt: skip
    theirs = factors_of(peft := get_peft_model(dequantised_model(info, tmp_path / "joined"), settings))
    model = with_adapter(base, recipe)
    ours = factors_of(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, factor in ours.items():
            factor.copy_(torch.randn_like(factor) * 0.1)
            theirs[key].copy_(factor)
    wanted, loss = plain_loss(peft, examples), answer_loss(model, pack(examples), None)
    loss = loss / sum(example.num_labels for example in examples)  # of a row it is a sum
    wanted.backward()
    loss.backward()

    assert ours.keys() == theirs.keys()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    # bitsandbytes' backward pass rounds the weights of layers without an adapter to what they were made from, bfloat16
    for key, factor in ours.items():
        assert (factor.grad - theirs[key].grad).norm() < 0.01 * theirs[key].grad.norm(), key


@pytest.mark.parametrize("target", ["attention", "all-linear"])
@pytest.mark.parametrize("name", MIXTURES)
def test_trained_and_loaded_by_peft(name: str, target: str, home: Home, tmp_path: Path) -> None:
    """A run lowers the loss, and PEFT over transformers' joined experts scores what the run measured.

    PEFT joins the experts' factors as transformers does the experts. It cannot where other layers have the names
    of an expert's: a shared expert, or a layer without experts.
    """
    info = add_mixture(name, home, tmp_path / "model")
    recipe = load_recipe(write_recipe(tmp_path, count=8), [f"adapter.target_modules={target}"])
    version = train(recipe, home)
    measured = version.lineage["metrics"]["yes-no"]
    tests = tokenise(read_chats(recipe.data.test), load_base(info).tokenizer, 512)

    assert measured["adapter"]["loss"] < measured["base"]["loss"]
    if target == "attention" or name not in ALIKE:
        model = PeftModel.from_pretrained(dequantised_model(info, tmp_path / "joined"), str(version.path)).eval()
        with torch.inference_mode():
            assert plain_loss(model, tests).item() == pytest.approx(measured["adapter"]["loss"], rel=1e-4)
