"""On a GPU: a recipe trains, and the server answers with what it trained."""

from pathlib import Path

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.held import unnest
from adapterhub_local.base.load import load_base
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.train.adapter import factors_of
from adapterhub_local.train.fused_lora import converted, fuse, fused_layers
from adapterhub_local.train.train import train
from serve.engine.build import build_engine
from serve.engine.request import Request, SamplingParams
from tests.chats import write_recipe
from tests.gpu.check import NO_GPU
from tests.tiny import byte_tokenizer
from tests.train.test_grpo import drawing, objective_of
from tests.train.test_train_product import layer_of

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
]


@pytest.mark.parametrize("tokens", [100, 700])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_layer_is_pefts(compute: torch.dtype, tokens: int) -> None:
    """Output and gradients of a step, whichever way its weight is dequantised."""

    def results(fused: bool) -> list[torch.Tensor]:
        layer = layer_of(compute, torch.float32).to(DEVICE)
        if fused:
            assert fuse(layer) == 1
            unnest(layer.base_layer.weight)
        torch.manual_seed(1)
        x = torch.randn(2, tokens, 128, device=DEVICE, dtype=compute).requires_grad_()
        factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        with converted(fused_layers(layer), compute):
            y = layer(x)
            return [y.detach(), *torch.autograd.grad(y, [x, *factors], torch.randn_like(y))]

    for got, wanted in zip(results(True), results(False), strict=True):
        assert got.dtype == wanted.dtype
        assert (got - wanted).float().norm() < (1e-2 if compute == torch.bfloat16 else 1e-3) * wanted.float().norm()


def test_a_run_with_liger(tmp_path: Path, home: Home, tiny_base: BaseInfo) -> None:
    """Its kernels answer as the base does, and the loss comes to where it does without them."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    losses = {}
    for kernels in ("torch", "liger"):
        recipe = load_recipe(write_recipe(tmp_path), ["train.epochs=8", f"train.kernels='{kernels}'"])
        version = train(recipe, home)
        assert ("liger-kernel" in version.lineage["environment"]) == (kernels == "liger")
        losses[kernels] = version.lineage["training"]["curve"][-1][1]
    assert losses["liger"] == pytest.approx(losses["torch"], rel=0.1)


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "adamw"])
def test_a_recipe_trains(optimizer: str, tmp_path: Path, home: Home, tiny_base: BaseInfo) -> None:
    """Loss falls, on the GPU, and the server takes the adapter."""
    recipe = load_recipe(write_recipe(tmp_path), ["train.epochs=8", f"train.optimizer='{optimizer}'"])
    version = train(recipe, home)
    curve = version.lineage["training"]["curve"]

    assert version.lineage["environment"]["device"] == DEVICE
    assert curve[-1][1] < curve[0][1]
    base = load_base(tiny_base, device=DEVICE)
    engine = build_engine(base)
    digest = engine.pool.acquire(Registry(home).resolve(str(version))).digest
    request = Request("one", tuple(byte_tokenizer().encode("a")), SamplingParams(max_tokens=4, temperature=0), digest)
    engine.submit(request)
    while engine.has_work:
        assert not [output.error for output in engine.step() if output.error]
    assert len(request.output) == 4


def test_answers_of_grpo_are_drawn_by_the_engine(tmp_path: Path, home: Home, tiny_base: BaseInfo) -> None:
    """Beside the trained model, over the same tensors: greedy answers are transformers', and rewards rise."""
    recipe = drawing(tmp_path, "train.epochs=2", "adapter.target_modules=all-linear")
    base = load_base(tiny_base, dtype=torch.float32, device=DEVICE)
    goal, model, examples = objective_of(base, recipe, by_engine=True)
    drawer = goal.drawer
    for scale in (1.0, -0.5):  # the factors of a later step, in graphs that were captured before
        for factor in factors_of(model).values():
            factor.data.mul_(scale)
        goal.drawer = drawer
        drawn = [each.answers[0].ids for each in goal._draw(examples, 1)]
        goal.drawer = None
        wanted = [each.answers[0].ids for each in goal._draw(examples, 1)]
        assert sum(one == other for one, other in zip(drawn, wanted, strict=True)) >= len(wanted) - 1  # but for a tie
    version = train(recipe, home)
    scores = version.lineage["metrics"]["yes-no"]
    assert scores["adapter"]["reward"] > scores["base"]["reward"]
    assert not any("drawn by transformers" in note for note in version.lineage["notes"])
