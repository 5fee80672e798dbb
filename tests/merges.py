"""Random adapters to merge, and what their dense sum is."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from adapterhub_local.lora.adapter import AdapterFile, open_adapter
from adapterhub_local.lora.config import CONFIG, WEIGHTS, AdapterConfig
from adapterhub_local.lora.write import tensor_name, write_adapter

FIRST, SECOND = "sha256:" + "1" * 64, "sha256:" + "2" * 64
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj")
SIZES = {MODULES[0]: (8, 8), MODULES[1]: (8, 12), MODULES[2]: (12, 8)}  # module -> (in, out)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def save_adapter(
    folder: Path,
    seed: int = 0,
    *,
    ranks: dict[str, int] | None = None,
    alpha: float = 4,
    rslora: bool = False,
    alphas: dict[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
    sizes: dict[str, tuple[int, int]] = SIZES,
    fingerprint: str | None = FIRST,
    hub_id: str | None = None,
) -> Path:
    """A self-describing file with random factors."""
    generator = torch.Generator().manual_seed(seed)
    ranks = dict.fromkeys(sizes, 2) if ranks is None else ranks
    tensors = {}
    for module, rank in ranks.items():
        size_in, size_out = sizes[module]
        tensors[tensor_name(module, "A")] = torch.randn(rank, size_in, generator=generator).to(dtype)
        tensors[tensor_name(module, "B")] = torch.randn(size_out, rank, generator=generator).to(dtype)
    rank = max(ranks.values())
    patterns: dict[str, Any] = {"rank_pattern": ranks, "alpha_pattern": alphas or {}}
    config = AdapterConfig(rank, alpha, tuple(sorted(ranks)), use_rslora=rslora, **patterns, base_model=hub_id)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).unlink(missing_ok=True)
    write_adapter(folder, config, shapes, tensors.items(), fingerprint)
    (folder / CONFIG).unlink()
    return (folder / WEIGHTS).replace(folder.with_suffix(".safetensors"))


def dense(adapter: AdapterFile) -> dict[str, torch.Tensor]:
    """The deltas of an adapter in float64."""
    return {
        module: delta.scaling * (delta.B.double() @ delta.A.double()) for module, delta in adapter.deltas()
    }  # scaling as a Python float is float64


def dense_sum(paths: Sequence[Path], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """The weighted sum of whole matrices in float64: what merging must give."""
    total: dict[str, torch.Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        for module, delta in dense(open_adapter(path)).items():
            total[module] = total.get(module, torch.zeros_like(delta)) + weight * delta
    return total


def frobenius(deltas: dict[str, torch.Tensor]) -> float:
    """The norm over all modules."""
    return math.sqrt(sum(float(delta.square().sum()) for delta in deltas.values()))


def gap(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The norm of the difference over all modules of both."""
    modules = left.keys() | right.keys()
    zero = torch.zeros((), dtype=torch.float64)
    return frobenius({module: left.get(module, zero) - right.get(module, zero) for module in modules})


WEIGHT = st.floats(-4, 4, allow_subnormal=False).filter(lambda weight: abs(weight) > 1e-3)


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, Any]:
    """The arguments of a random adapter: a part of the modules, ranks, scalings and dtype of its own."""
    modules = draw(st.lists(st.sampled_from(MODULES), min_size=1, unique=True))
    return {
        "seed": draw(st.integers(0, 2**31)),
        "ranks": {module: draw(st.integers(1, 5)) for module in modules},
        "alpha": draw(st.sampled_from([1, 4, 16.5, -2])),
        "rslora": draw(st.booleans()),
        "alphas": {module: draw(st.floats(0.5, 30)) for module in modules if draw(st.booleans())},
        "dtype": draw(st.sampled_from(DTYPES)),
    }


quick = settings(suppress_health_check=list(HealthCheck), max_examples=25)
