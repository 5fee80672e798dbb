"""DoRA on the quantised base: the rows of W count by their own scale, for the tokens of such an adapter alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file as load_tensors

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import LoadedBase, load_base
from adapterhub_local.base.weights import dequantised
from adapterhub_local.errors import BadFile, Incompatible, QhubError
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.lora.write import write_safetensors
from adapterhub_local.merge.dora import dora_delta
from adapterhub_local.registry import Registry, Version
from serve.adapters.mixture import mixture
from serve.adapters.slots import Slots
from serve.engine.build import build_engine
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams
from serve.kernels import reference
from serve.kernels.choose import Kernels
from serve.lora.product import Segment
from tests.serve.adapter_makers import publish
from tests.serve.lora.test_lora import factors, layers_and_slots, layers_of

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
MODULES = ("q_proj", "v_proj", "down_proj")


def save_dora(base: LoadedBase, folder: Path, seed: int, strength: float = 0.2) -> None:
    """A folder that PEFT saved with DoRA of random factors and lengths; of strength 0 as it begins."""
    model = get_peft_model(base.model, LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=list(MODULES)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + strength * torch.randn(parameter.shape, generator=generator)
        elif "lora_B" in name:
            parameter.data.copy_(strength * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    model.unload()


def register(registry: Registry, name: str, folder: Path, base: BaseInfo) -> Version:
    return registry.publish(name, {each: folder / each for each in (CONFIG, WEIGHTS)}, {"base": base.lineage()})


@pytest.fixture
def base(tiny_base: BaseInfo) -> LoadedBase:
    """The tiny base in float32."""
    return load_base(tiny_base, dtype=torch.float32, device="cpu")


@torch.inference_mode()
def test_a_mix_is_the_sum_of_changes(base: LoadedBase, home, tmp_path: Path) -> None:
    """DoRA and plain parts, negative weights: W + sum of w_i (W_i - W), module by module, and one answer of it."""
    registry = Registry(home)
    versions = [publish(registry, "plain", base.info, seed=1, modules=MODULES)]
    for seed in (2, 3):
        save_dora(base, tmp_path / str(seed), seed)
        versions.append(register(registry, f"dora{seed}", tmp_path / str(seed), base.info))
    engine = build_engine(load_base(base.info, device="cpu"), EngineOptions(max_rows=4, max_adapters=2))
    weights = (0.5, 0.8, -0.4)
    mix = mixture(list(zip(versions, weights, strict=True)))
    held = engine.pool.acquire(mix).digest
    found = engine.pool.get(held)

    opened = [open_adapter(version.path, dora=True) for version in versions]
    for module, weight, dtype in dequantised(base.info, found):
        wanted = torch.zeros_like(weight)
        for adapter, share in zip(opened, weights, strict=True):
            delta = adapter.delta(module)
            has_dora = module in adapter.magnitudes
            change = dora_delta(weight, delta, adapter.magnitude(module), dtype) if has_dora else delta.dense()
            wanted += share * change
        a, b, scale = found[module]
        torch.testing.assert_close(scale[:, None] * weight + (a @ b).T, wanted, atol=1e-5, rtol=1e-4)

    params = SamplingParams(max_tokens=4, temperature=0)
    answers = []
    for number, digest in enumerate((held, None)):
        request = Request(str(number), (5, 6, 7), params, digest)
        engine.submit(request)
        while engine.has_work:
            assert not any(output.error for output in engine.step())
        answers.append(request.output)
    assert answers[0] != answers[1]


@torch.inference_mode()
def test_scales_stay_with_their_tokens_and_leave_with_their_adapter() -> None:
    """Neighbours without DoRA are as exact as before, and who gets the slot next has no scale in it."""
    layers, slots, context = layers_and_slots(max_slots=2)
    plain, scale = factors(1, 4), torch.linspace(-0.5, 0.5, 16)
    dora = {"q": (*factors(2, 4)["q"], scale)}
    x = torch.randn(1, 6, 24)

    def output(**adapters: slice) -> torch.Tensor:
        places = slots.find(adapters)
        segments = [Segment(part.start, part.stop, places[name]) for name, part in adapters.items()]
        context.begin(segments, segments, x.device, 0)
        out = layers["q"](x + 0)[0]
        context.end()
        return out

    q = layers["q"].base
    for name, each in (("plain", plain), ("dora", dora)):
        slots.put(name, each, keep={"plain", "dora"})
    alone = output(plain=slice(0, 2))
    assert context.scaled_tokens == ()
    both = output(plain=slice(0, 2), dora=slice(3, 6))
    assert torch.equal(both[:2], alone[:2])
    torch.testing.assert_close(both[2], q(x)[0, 2])
    a, b, _ = dora["q"]
    expected = (1 + scale) * (x[0, 3:] @ q.weight.T) + q.bias + x[0, 3:] @ a @ b
    torch.testing.assert_close(both[3:], expected, atol=1e-4, rtol=1e-5)

    freed = slots.free("plain")
    assert freed is not None
    slots.compact(freed.rank)  # moves the other one
    torch.testing.assert_close(output(dora=slice(3, 6))[3:], expected, atol=1e-4, rtol=1e-5)
    slots.put("third", plain, keep={"dora"})
    slots.put("next", plain, keep={"third"})
    assert "dora" not in slots
    torch.testing.assert_close(output(next=slice(0, 2))[:2], alone[:2])
    assert all(not bool(stack.any()) for stack in layers["q"].group.scales[0].values())


@pytest.mark.parametrize("names", [("add_parts",), ()], ids=["kernel", "torch"])
@torch.inference_mode()
def test_scales_in_place(names: tuple[str, ...]) -> None:
    """The same where adapters are in place, by the kernel and by torch."""
    layers, context = layers_of()
    slots = Slots(layers, 2)
    context.kernels = Kernels({name: getattr(reference, name) for name in names})
    plain, scale = factors(1, 4), torch.linspace(-0.5, 0.5, 16)
    dora = {"q": (*factors(2, 4)["q"], scale)}
    places = [slots.put(name, each, {"plain", "dora"}) for name, each in (("plain", plain), ("dora", dora))]
    segments = [Segment(0, 2, places[0]), Segment(3, 6, places[1])]
    x = torch.randn(1, 6, 24)
    context.begin(segments, segments, x.device, 0)
    out, q = layers["q"](x)[0], layers["q"].base
    context.end()
    wanted = q(x)[0]
    wanted[:2] += x[0, :2] @ plain["q"][0] @ plain["q"][1]
    wanted[3:] += scale * (x[0, 3:] @ q.weight.T) + x[0, 3:] @ dora["q"][0] @ dora["q"][1]
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-5)


def without_a_magnitude(tensors: dict, config: dict) -> None:
    del tensors[next(name for name in tensors if "magnitude" in name)]


def without_magnitudes(tensors: dict, config: dict) -> None:
    for name in [name for name in tensors if "magnitude" in name]:
        del tensors[name]


def unsaid(tensors: dict, config: dict) -> None:
    config["use_dora"] = False


def wrong_length(tensors: dict, config: dict) -> None:
    name = next(name for name in tensors if "magnitude" in name)
    tensors[name] = tensors[name][1:].clone()


def not_a_number(tensors: dict, config: dict) -> None:
    tensors[next(name for name in tensors if "magnitude" in name)][0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (without_a_magnitude, BadFile, r"down_proj has no lora_magnitude_vector"),
        (without_magnitudes, BadFile, r"sets use_dora, but there are no magnitudes"),
        (unsaid, BadFile, r"does not set use_dora as .*lora_magnitude_vector is"),
        (wrong_length, BadFile, r"lora_magnitude_vector \[63\] does not fit"),
        (not_a_number, BadFile, r"NaN or infinity in .*lora_magnitude_vector"),
    ],
)
def test_halves_of_dora_are_refused(
    base: LoadedBase, home, tmp_path: Path, spoil: Callable, error: type[QhubError], message: str
) -> None:
    """What is not wholly DoRA is refused by the name of its tensor, and never served as the LoRA that it is not."""
    save_dora(base, tmp_path / "dora", 1)
    config = json.loads((tmp_path / "dora" / CONFIG).read_text())
    tensors = load_tensors(tmp_path / "dora" / WEIGHTS)
    spoil(tensors, config)
    (tmp_path / "dora" / CONFIG).write_text(json.dumps(config))
    (tmp_path / "dora" / WEIGHTS).unlink()
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "dora" / WEIGHTS, shapes, tensors.items(), {"format": "pt"})
    engine = build_engine(load_base(base.info, device="cpu"), EngineOptions(max_rows=1))
    with pytest.raises(error, match=message):
        engine.pool.acquire(register(Registry(home), "a", tmp_path / "dora", base.info))
    assert len(engine.pool) == 0


def test_untrained_dora_has_no_effect(base: LoadedBase, home, tmp_path: Path) -> None:
    """An adapter as PEFT begins it is refused, although its lengths, rounded, are not quite the base's."""
    save_dora(base, tmp_path / "dora", 1, strength=0.0)
    engine = build_engine(load_base(base.info, device="cpu"), EngineOptions(max_rows=1))
    with pytest.raises(Incompatible, match="changes nothing"):
        engine.pool.acquire(register(Registry(home), "a", tmp_path / "dora", base.info))
