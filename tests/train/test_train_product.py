"""LoRA over 4-bit weights as one operation: PEFT's numbers and files, wherever PEFT's own layer is not needed."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.held import unnest
from adapterhub_local.base.load import import_bitsandbytes, load_base
from adapterhub_local.recipe import load_recipe
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.packing import forward, pack
from adapterhub_local.train import adapter
from adapterhub_local.train.adapter import factors_of
from adapterhub_local.train.checkpointing import enable_checkpointing
from adapterhub_local.train.fused_lora import converted, dequantised, fuse, fused_layers
from adapterhub_local.train.loss import answer_loss
from tests.chats import write_recipe

ROW = pack([Example(tuple(range(10 + at, 50 + at)), ((30, 40),)) for at in range(3)])


def layer_of(compute: torch.dtype, factors: torch.dtype, bias: bool = True, **config) -> Linear4bit:
    """PEFT's layer over random NF4 weights of float32, its factors drawn."""
    torch.manual_seed(0)
    bnb = import_bitsandbytes().nn
    base = bnb.Linear4bit(128, 192, bias=bias, compute_dtype=compute, quant_type="nf4")
    base.weight = bnb.Params4bit(torch.randn(192, 128), requires_grad=False, quant_type="nf4").to("cpu")
    base.support_avx512bf16_for_cpu = False
    base.to(compute)
    settings = LoraConfig(r=8, lora_alpha=20, init_lora_weights=False, **config)
    layer = Linear4bit(base, "default", settings, r=8, lora_alpha=20)
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter.is_floating_point() and parameter.shape != (192,))
    layer.lora_A.to(factors), layer.lora_B.to(factors)
    return layer.train()


def computed(layer: Linear4bit, compute: torch.dtype) -> list[torch.Tensor]:
    """Output and the gradients of x, A and B."""
    torch.manual_seed(1)
    x = torch.randn(2, 30, 128).to(compute).requires_grad_()
    y = layer(x)
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [y.detach(), *torch.autograd.grad(y, [x, *factors], torch.randn(y.shape).to(compute))]


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_layer_is_pefts(compute: torch.dtype, factors: torch.dtype, rslora: bool) -> None:
    """Output and gradients are those of PEFT's layer, in the same dtypes; equal again when computed again."""
    config = {"use_rslora": rslora}
    wanted = computed(layer_of(compute, factors, **config), compute)
    layer = layer_of(compute, factors, **config)
    assert fuse(layer) == 1
    got, again = computed(layer, compute), computed(layer, compute)
    tolerance = 1e-5 if compute == factors == torch.float32 else 2e-2

    for one, other, repeated in zip(got, wanted, again, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).float().norm() < tolerance * other.float().norm()
        assert torch.equal(one, repeated)


def test_the_weight_is_that_of_the_forward_pass() -> None:
    """The backward pass multiplies with what the forward pass did, though the base was stored in 16 bits."""
    layer = layer_of(torch.float32, torch.float32, bias=False).base_layer
    layer.weight.quant_state.dtype = torch.bfloat16
    weight = dequantised(layer, torch.float32)

    assert torch.allclose(layer(torch.eye(128)).T, weight, rtol=0, atol=1e-6)
    assert not torch.allclose(weight, weight.bfloat16().float(), rtol=0, atol=1e-4)
    assert layer.weight.quant_state.dtype == torch.bfloat16


def test_copies_of_factors_last_as_long_as_they_are_asked_for() -> None:
    """What is computed with them is what is computed without, and afterwards changed factors count."""
    layer = layer_of(torch.bfloat16, torch.float32)
    fuse(layer)
    plain = computed(layer, torch.bfloat16)
    with converted(fused_layers(layer), torch.bfloat16):
        held = computed(layer, torch.bfloat16)
        with torch.no_grad():
            layer.lora_B["default"].weight.mul_(2)
        unchanged = computed(layer, torch.bfloat16)
    changed = computed(layer, torch.bfloat16)

    assert all(torch.equal(one, other) for one, other in zip(plain, held, strict=True))
    assert torch.equal(unchanged[0], plain[0])
    assert not torch.allclose(changed[0], plain[0], atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_in_another_dtype_are_not_used(dtype: torch.dtype) -> None:
    """A layer that is given other activations than the model's converts its factors itself; so do some of several."""
    layer = layer_of(torch.float32, dtype)
    fuse(layer)
    plain = computed(layer, torch.float32)
    with converted(fused_layers(layer), torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(computed(layer, torch.float32), plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constants_in_float32_give_the_same_weight(dtype: torch.dtype) -> None:
    """Dequantised, and as the layer multiplies with it."""
    layer = layer_of(dtype, torch.float32).base_layer
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight, y = dequantised(layer, dtype), layer(x)
    assert layer.weight.quant_state.nested
    for _ in range(2):
        unnest(layer.weight)
        assert not layer.weight.quant_state.nested
        assert torch.equal(dequantised(layer, dtype), weight)
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "change",
    ["adapter.rslora=true", "adapter.rank_pattern={ q_proj = 2 }", "adapter.alpha_pattern={ 'mlp.*' = 3 }"],
)
def test_a_model_is_pefts(
    tiny_base: BaseInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, checkpointed: bool
) -> None:
    """Loss and all gradients of a packed row are PEFT's, scalings by pattern and checkpointing included."""
    recipe = load_recipe(write_recipe(tmp_path), [change, "adapter.target_modules=all-linear"])
    found = []
    for fused in (True, False):
        base = load_base(tiny_base, dtype=torch.float32)
        for module in base.model.modules():
            if hasattr(module, "weight") and hasattr(module.weight, "quant_state"):
                module.weight.quant_state.dtype = torch.float32  # so that PEFT does not round in the backward pass
        if not fused:
            monkeypatch.setattr(adapter, "fuse", lambda model: 0)
        model = adapter.with_adapter(base, recipe).train()
        torch.manual_seed(3)
        for name, factor in factors_of(model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(factor, std=0.05)
        enable_checkpointing(model, checkpointed)
        loss = answer_loss(model, ROW, None)
        loss.backward()
        found.append([loss.detach(), *(factor.grad for factor in factors_of(model).values())])

    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


def test_what_is_not_plain_stays_pefts(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """DoRA and dropout compute as PEFT does; switched off, merged or beside another one an adapter does too."""
    path = write_recipe(tmp_path)
    for change in ("adapter.dora=true", "adapter.dropout=0.1"):
        assert fuse(adapter.with_adapter(load_base(tiny_base), load_recipe(path, [change]))) == 0

    model = adapter.with_adapter(load_base(tiny_base), load_recipe(path)).eval()
    with torch.no_grad():
        for name, factor in factors_of(model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(factor, std=0.05)
        plain = forward(load_base(tiny_base).model, ROW)[0]
        adapted = forward(model, ROW)[0]
        with model.disable_adapter():
            assert torch.equal(forward(model, ROW)[0], plain)
        assert not torch.allclose(adapted, plain, atol=1e-2)
        model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.set_adapter("other")  # its B is zero
        assert torch.allclose(forward(model, ROW)[0], plain, atol=1e-5)
        model.base_model.set_adapter(["default", "other"])
        assert torch.allclose(forward(model, ROW)[0], adapted, atol=1e-4)
