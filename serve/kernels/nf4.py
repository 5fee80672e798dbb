"""x @ W^T from 4-bit weights by `nf4.cu`: tensor cores for the few tokens of a decode step, the weights read once."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from serve.kernels.compiled import CannotCompile
from serve.kernels.nvrtc import Kernel, compile_source

SOURCE = Path(__file__).parent / "nf4.cu"


@dataclass(frozen=True)
class Variant:
    """How a program takes its part: see the source."""

    tokens: int  # in blocks of 8
    outputs: int  # in blocks of 16
    warps: int
    ahead: int
    resident: int  # programs that a multiprocessor has room for


# up to so many tokens, more go by 64; the fastest of those tried on an H100 (benchmarks/RESULTS.md)
VARIANTS = {
    8: Variant(1, 1, 8, 3, 2),
    16: Variant(2, 1, 8, 2, 2),
    32: Variant(4, 1, 8, 2, 2),
    64: Variant(8, 2, 8, 2, 1),
}
TYPES = (torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # before it there is neither bfloat16 nor this shape of product


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this kernel cannot be used, or None."""
    if device.type != "cuda" or torch.version.hip:
        return "it is for NVIDIA's GPUs"
    if dtype not in TYPES:
        return f"it computes in 16 bits, the model in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return "it is for GPUs of Ampere or later"
    try:
        for tokens in VARIANTS:
            _kernel(device, dtype, tokens)
    except (CannotCompile, RuntimeError) as error:
        return str(error)
    return None


def multiply(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, out_features: int
) -> torch.Tensor:
    """`reference.multiply` in 16 bits; in_features is a multiple of 64, the last dimension of x contiguous."""
    tokens, in_features = x.shape
    out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    if x.stride(0) % 8 or x.data_ptr() % 16:  # it is read 16 bytes at a time
        x = x.contiguous() if x.stride(0) % 8 else x.clone()
    most = next((each for each in VARIANTS if each >= tokens), max(VARIANTS))
    variant = VARIANTS[most]
    tiles = -(-out_features // (16 * variant.outputs))
    rounds = -(-tiles // (variant.resident * _multiprocessors(x.device)))
    grid = -(-tiles // rounds), -(-tokens // (8 * variant.tokens))
    _kernel(x.device, x.dtype, most).launch(
        grid, 32 * variant.warps, x, packed, absmax, code, out, x.stride(0), tokens, in_features, out_features
    )
    return out


@cache
def _kernel(device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    return Kernel(compile_source(SOURCE, capability, macros(VARIANTS[tokens], dtype)), "multiply")


def macros(variant: Variant, dtype: torch.dtype) -> dict[str, int]:
    """What the source is compiled with."""
    return {
        "NT": variant.tokens,
        "MT": variant.outputs,
        "WARPS": variant.warps,
        "AHEAD": variant.ahead,
        "RESIDENT": variant.resident,
        "HALF": int(dtype == torch.float16),
    }


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
