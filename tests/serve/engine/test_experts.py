"""Mixtures of experts served: adapters on attention and on experts, in one batch, answer as PEFT over transformers'."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapterhub_local import merge_adapters
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from serve.engine.build import build_engine
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams
from serve.lora.experts import follow_routes
from serve.lora.linear import LoraContext, wrap_linears
from serve.lora.product import Segment, Slot
from tests.mixtures import ALIKE, MIXTURES, add_mixture, dequantised_model
from tests.serve.engine.test_architectures import NUM_TOKENS, adapted, answer_alone

PROMPTS = [list(range(3, 12)), [7], [40, 3, 9, 120, 33]]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def publish(registry: Registry, name: str, model: PeftModel, folder: Path, lineage: dict) -> None:
    model.save_pretrained(folder)
    files = {each.name: each for each in folder.iterdir() if each.name.startswith("adapter_")}
    registry.publish(name, files, lineage)


def answers(engine, requests: dict) -> dict:
    """The tokens of all requests, which are answered at once."""
    engine.submit(*requests.values())
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
    return {key: request.output for key, request in requests.items()}


@pytest.mark.parametrize("base_exec", ["auto", "nf4"])
@pytest.mark.parametrize("name", MIXTURES)
def test_answers_are_those_of_peft(name: str, base_exec: str, home: Home, tmp_path: Path) -> None:
    """Base, attention, experts and a merge of both in one batch: greedy tokens are PEFT's on dequantised weights.

    Where other layers are called as an expert's PEFT cannot join the factors, so there attention alone is compared.
    """
    info = add_mixture(name, home, tmp_path / "model")
    registry, lineage = Registry(home), {"base": info.lineage()}
    names = ["on-attention"] if name in ALIKE else ["on-attention", "on-all", "both"]
    for index, targets in enumerate((ATTENTION, "all-linear")[: len(names)]):
        model = adapted(load_base(info).model, index, 3 + index, targets=targets)
        publish(registry, names[index], model, tmp_path / names[index], lineage)
    if "both" in names:
        merge_adapters(["on-attention", "on-all"], [0.6, 0.7], name="both", registry=registry)
    expected = {}
    for key in (None, *names):
        model = dequantised_model(info, tmp_path / f"joined-{key}")
        if key:
            model = PeftModel.from_pretrained(model, str(registry.resolve(key).path)).eval()
        for which, prompt in enumerate(PROMPTS):
            expected[key, which] = answer_alone(model, prompt)[0]
    options = EngineOptions(max_rows=8, tokens_per_step=11, base_exec=base_exec, max_length=64)
    engine = build_engine(load_base(info), options)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0)
    requests = {
        (key, which): Request(
            f"{key}-{which}", tuple(PROMPTS[which]), params,
            engine.pool.acquire(registry.resolve(key)).digest if key else None,
        )
        for key, which in sorted(expected, key=lambda pair: pair[1])
    }  # fmt: skip

    assert answers(engine, requests) == expected
    assert len({tuple(expected[key, 0]) for key in (None, *names)}) > 1


def test_an_adapter_that_arrives_meanwhile(home: Home, tmp_path: Path) -> None:
    """Factors that appear at an expert's layers after its tokens were noted are asked for none of them."""
    model = load_base(add_mixture("qwen3-moe", home, tmp_path / "model")).model
    context = LoraContext()
    layers = wrap_linears(model, context)
    follow_routes(model, context, layers)
    experts = model.model.layers[0].mlp.experts
    group = layers["model.layers.0.mlp.experts.1.gate_proj"].group
    context.begin([Segment(0, 4, Slot(2, 0)), Segment(4, 9, Slot(2, 1))], [], torch.device("cpu"), 64)
    whole = context.tokens
    with experts.visit(1, torch.tensor([1, 3, 8])):
        assert context.tokens is None  # so that what is added now finds nothing to be added to
    group.a[2] = torch.zeros(2, 64, 2)
    with experts.visit(1, torch.tensor([1, 3, 8])):
        assert context.tokens is not None
        found = [(each.first, each.end, each.width) for each in context.tokens.grids]
    assert found == [(0, 2, 2)]
    assert context.tokens is whole
    context.end()
    with experts.visit(1, torch.tensor([1, 3, 8])):
        assert context.tokens is None
