"""Blocks computed again: the same gradients to the bit, no product that nobody reads, torch's own way where needed."""

from typing import Any

import pytest
import torch
from torch import nn

from adapterhub_local.rows.packing import pack
from adapterhub_local.train import recompute
from adapterhub_local.train.checkpointing import enable_checkpointing
from adapterhub_local.train.recompute import Block
from tests.architectures import SHAPES
from tests.train.test_train_checkpointing import EXAMPLES, gradients, model_of


def blocks_of(model: Any) -> list[Any]:
    """What calls the blocks of a model, in order."""
    return [module._gradient_checkpointing_func for module in model.get_base_model().base_model.layers]


@pytest.mark.parametrize("name", SHAPES)
def test_what_nobody_reads_may_be_anything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, with memory that holds no numbers: the first pass finds the last product, the second leaves it out."""
    row = pack(EXAMPLES)
    wanted = gradients(model_of(name), row)
    model = model_of(name)
    enable_checkpointing(model, True)
    empty = torch.Tensor.new_empty

    def unset(tensor: torch.Tensor, *size: Any, **given: Any) -> torch.Tensor:
        made = empty(tensor, *size, **given)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", unset)
    for _ in range(2):
        model.zero_grad()
        got = gradients(model, row)
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_the_last_product() -> None:
    """Found in a block whose sum takes it as it is, and in no block where a norm reads it."""
    found = {}
    for name in ("llama", "qwen3", "phi3", "gemma2"):
        model = model_of(name)
        enable_checkpointing(model, True)
        gradients(model, pack(EXAMPLES))
        layers = model.get_base_model().base_model.layers
        found[name] = [
            block.last is not None and block.last is layer.mlp.down_proj.base_layer
            for block, layer in zip(blocks_of(model), layers, strict=True)
        ]
    assert found == {"llama": [True, True], "qwen3": [True, True], "phi3": [True, True], "gemma2": [False, False]}


@pytest.mark.parametrize(
    ("change", "ours"),
    [({}, True), ({"attention_dropout": 0.1}, False), ({"dropout_in_a_factor": 0.1}, False)],
)
def test_random_numbers_stay_torchs(change: dict[str, float], ours: bool) -> None:
    """A pass that draws numbers must draw the same ones again."""
    factor = change.pop("dropout_in_a_factor", 0.0)
    model = model_of("llama", **change)
    model.get_base_model().extra = nn.Dropout(factor)
    enable_checkpointing(model, True)
    assert all(isinstance(block, Block) == ours for block in blocks_of(model))


def double(states: torch.Tensor, *, other: Any = None) -> torch.Tensor:
    """A block with an input of its own name."""
    return 2 * states if other is None else states * other[0]


@pytest.mark.parametrize("case", ["inner", "first", "named", "no gradient", "autocast"])
def test_who_computes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours takes a block whose gradients all pass by its inputs in order; torch takes the others, and nobody a mere
    forward pass."""
    from functools import partial

    plain: list[str] = []
    ours: list[str] = []

    def seen(run: Any, *inputs: Any) -> Any:
        plain.append(case)
        return run(*inputs)

    apply = recompute.Recomputed.apply
    monkeypatch.setattr(recompute.Recomputed, "apply", lambda *given: (ours.append(case), apply(*given))[1])
    states = torch.ones(3, requires_grad=case in ("inner", "no gradient", "autocast"))
    other = (torch.full((3,), 2.0, requires_grad=True),) if case == "named" else None
    with torch.set_grad_enabled(case != "no gradient"), torch.autocast("cpu", enabled=case == "autocast"):
        out = Block(seen)(partial(double, other=other), states)
    assert torch.equal(out, torch.full((3,), 2.0))
    assert (ours, plain) == {
        "autocast": ([], ["autocast"]),
        "inner": (["inner"], []), "first": ([], ["first"]), "named": ([], ["named"]), "no gradient": ([], []),
    }[case]  # fmt: skip


def test_several_outputs() -> None:
    """Each gradient reaches the inputs, and an output that nobody used has none."""
    weight = nn.Parameter(torch.tensor([3.0]))

    def run(states: torch.Tensor, scale: float) -> tuple[Any, ...]:
        return states * weight * scale, states + 1, "a word"

    found = []
    for block in (Block(lambda run, *inputs: None), None):
        weight.grad = None
        states = torch.tensor([2.0], requires_grad=True)
        first, second, word = block(run, states, 5.0) if block else run(states, 5.0)
        assert word == "a word"
        (first * 7).backward(retain_graph=False)
        found.append((first.item(), second.item(), states.grad.item(), weight.grad.item()))
    assert found[0] == found[1] == (30.0, 3.0, 105.0, 70.0)
