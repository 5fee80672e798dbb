"""Whether the kernels are used: only where they run, and only after they gave what plain torch gives.

A kernel that fails later, on a shape not seen before, is dropped for its reference with one warning; no request and
no answer depends on a kernel.
"""

import logging
import math
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from adapterhub_local.base.attention import probes
from adapterhub_local.errors import InputError
from serve.kernels import reference
from serve.kernels.compiled import CannotCompile
from serve.kernels.cpu import load_kernels
from serve.kernels.part import Part
from serve.kernels.pointwise_check import CHECKS

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the largest entry


class Kernels:
    """The kernels in use, by name; those that failed are replaced by plain torch."""

    def __init__(self, own: dict[str, Callable[..., Any]]) -> None:
        self._own = own

    @property
    def names(self) -> list[str]:
        """Which are still used."""
        return sorted(self._own)

    def has(self, name: str) -> bool:
        """Whether the kernel of this name is still used."""
        return name in self._own

    def drop(self, name: str, reason: str) -> None:
        """Use plain torch from now on."""
        if self._own.pop(name, None) is not None:
            logger.warning("the kernel %s is not used: %s. Plain torch computes the same, more slowly", name, reason)

    def add_lora(self, *args: Any) -> None:
        """See `reference.add_lora`."""
        self._call("add_lora", args)

    def add_parts(self, *args: Any) -> None:
        """See `reference.add_parts`."""
        self._call("add_parts", args)

    def paged_attention(self, *args: Any) -> torch.Tensor:
        """See `reference.paged_attention`."""
        out: torch.Tensor = self._call("paged_attention", args)
        return out

    def multiply(self, *args: Any) -> torch.Tensor:
        """See `reference.multiply`."""
        product: torch.Tensor = self._call("multiply", args)
        return product

    def add_norm(self, *args: Any) -> torch.Tensor:
        """See `reference.add_norm`."""
        normed: torch.Tensor = self._call("add_norm", args)
        return normed

    def rotate_and_write(self, *args: Any) -> None:
        """See `reference.rotate_and_write`."""
        self._call("rotate_and_write", args)

    def silu_multiply(self, *args: Any) -> torch.Tensor:
        """See `reference.silu_multiply`."""
        product: torch.Tensor = self._call("silu_multiply", args)
        return product

    def _call(self, name: str, args: tuple[Any, ...]) -> Any:
        own = self._own.get(name)
        if own is not None:
            try:
                return own(*args)
            except torch.OutOfMemoryError:
                raise  # not the kernel's fault
            except Exception as error:
                # a compiler for a GPU that nobody tried may raise anything
                self.drop(name, _line(error))
        return getattr(reference, name)(*args)


def choose_kernels(
    wanted: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], *, check: bool = True
) -> Kernels | None:
    """The kernels to use with a model of this device, dtype and (heads, kv_heads, head_dim); None: plain torch.

    `auto` takes those that work here: Triton's on a GPU, on a CPU those compiled from C. `triton` and `c` are the
    same, but raise InputError where they cannot run at all.
    """
    if wanted == "torch":
        return None
    is_c = wanted == "c" or (wanted == "auto" and device.type == "cpu")
    reason, own = _compiled(device, dtype) if is_c else _triton(device, dtype)
    if reason is not None:
        if wanted != "auto":
            raise InputError(f"--kernels {wanted} cannot be used here: {reason}. Leave it out, or give --kernels torch")
        logger.info("no kernels: %s. Plain torch computes the same, more slowly", reason)
        return None
    kernels = Kernels(own)
    checks: dict[str, Callable[..., float]] = {
        "add_lora": _check_lora,
        "add_parts": _check_parts,
        "paged_attention": _check_attention,
        "multiply": _check_multiply,
        **CHECKS,
    }
    for name, compare in checks.items() if check else ():
        if name not in own:  # C has parts instead of stacks, and a whole step
            continue
        try:
            difference = compare(own[name], dtype, device, heads)
        except Exception as error:
            kernels.drop(name, _line(error))
            continue
        if not difference <= TOLERANCE.get(dtype, 2e-2):
            kernels.drop(name, f"its results differ from plain torch's by {difference:.1e} of the largest")
    return kernels if kernels.names else None


def _compiled(device: torch.device, dtype: torch.dtype) -> tuple[str | None, dict[str, Callable[..., Any]]]:
    """Why there are no kernels of C, or the kernels."""
    if device.type != "cpu":
        return f"they are for a CPU, the model is on the {device.type}", {}
    if dtype != torch.float32:
        steps = " (whole steps do in bfloat16, too, unless --kernels says otherwise)" * (dtype == torch.bfloat16)
        return f"they compute in float32, the model in {str(dtype).removeprefix('torch.')}{steps}", {}
    try:
        return None, load_kernels()
    except CannotCompile as error:
        return str(error), {}


def _triton(device: torch.device, dtype: torch.dtype) -> tuple[str | None, dict[str, Callable[..., Any]]]:
    """Why there are no kernels of Triton, or the kernels; the product with 4-bit weights is of CUDA C++."""
    try:
        from serve.kernels import attention, launch, lora, nf4, pointwise
    except ImportError as error:
        return f"Triton cannot be imported ({error})", {}
    if device.type != "cuda" and not launch.INTERPRETED:
        return f"they are for a GPU, the model is on the {device.type}", {}
    no_product = nf4.why_not(device, dtype)
    if no_product is not None:
        logger.info("bitsandbytes multiplies the base's weights, not our kernel: %s", no_product)
    return None, {
        **({"multiply": nf4.multiply} if no_product is None else {}),
        "add_lora": lora.add_lora,
        "paged_attention": attention.paged_attention,
        "add_norm": pointwise.add_norm,
        "rotate_and_write": pointwise.rotate_and_write,
        "silu_multiply": pointwise.silu_multiply,
    }


def _check_lora(
    kernel: Callable[..., None], dtype: torch.dtype, device: torch.device, heads: tuple[int, int, int]
) -> float:
    """The largest difference from the reference, of its largest entry, over a few ranks and layers."""
    worst = 0.0
    for rank, sizes in ((16, (160, 96, 96)), (8, (200, 200)), (64, (130,))):
        draw = _draw(dtype, device)
        x, outs = draw(20, 320), [draw(20, size) for size in sizes]
        a, bs = draw(3, 320, len(sizes) * rank) / 18, [draw(3, rank, size) for size in sizes]
        tiles = torch.tensor([[0, 1, 2], [1, 1, 0], [2, 1, -1], [3, 16, 1]], dtype=torch.int32, device=device)
        wanted = [out.clone() for out in outs]
        kernel(outs, x, a, bs, tiles)
        reference.add_lora(wanted, x, a, bs, tiles)
        worst = max(worst, *(_difference(got, one) for got, one in zip(outs, wanted, strict=True)))
    return worst


def _check_parts(
    kernel: Callable[..., None], dtype: torch.dtype, device: torch.device, heads: tuple[int, int, int]
) -> float:
    """The same for adapters in place, which are held in different dtypes."""
    draw, sizes = _draw(dtype, device), (160, 96, 96)
    x, outs = draw(20, 320), [draw(20, size) for size in sizes]
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    parts: list[Part | None] = [None]
    for rank, kind in zip((16, 8, 64), kinds, strict=True):
        bs = [draw(rank, size).to(kind) for size in sizes[:2]]
        parts.append(Part(rank, (draw(320, 2 * rank) / 18).to(kind), (0, rank, -1), (*bs, None), (None, None, None)))
    tiles = torch.tensor([[0, 1, 2], [1, 1, 0], [2, 1, -1], [3, 16, 1], [19, 1, 3]], dtype=torch.int32)
    wanted = [out.clone() for out in outs]
    kernel(outs, x, parts, tiles)
    reference.add_parts(wanted, x, parts, tiles)
    return max(_difference(got, one) for got, one in zip(outs, wanted, strict=True))


def _check_attention(
    kernel: Callable[..., torch.Tensor], dtype: torch.dtype, device: torch.device, heads: tuple[int, int, int]
) -> float:
    """The same for attention with the model's own heads, over short and long rows, of each kind."""
    num_heads, kv_heads, head_dim = heads
    worst = 0.0
    for kind in probes(head_dim**-0.5):
        draw = _draw(dtype, device)
        keys, values = draw(2, 80, kv_heads, 16, head_dim)
        tables = (
            torch.randperm(80, generator=torch.Generator().manual_seed(0), device="cpu").view(4, 20).int().to(device)
        )
        lengths = torch.tensor([320, 1, 0, 45], dtype=torch.int32, device=device)
        tensors = draw(4, num_heads, head_dim), keys, values, tables, lengths
        worst = max(worst, _difference(kernel(*tensors, kind), reference.paged_attention(*tensors, kind)))
    return worst


def _check_multiply(
    kernel: Callable[..., torch.Tensor], dtype: torch.dtype, device: torch.device, heads: tuple[int, int, int]
) -> float:
    """The same for products with 4-bit weights, for few and for many tokens."""
    worst = 0.0
    for tokens in (1, 20, 70):
        packed = (
            torch.randint(256, (100 * 320 // 2, 1), generator=torch.Generator().manual_seed(0), device="cpu")
            .byte()
            .to(device)
        )
        code, absmax = torch.linspace(-1, 1, 16, device=device), torch.linspace(0.5, 2, 500, device=device)
        tensors = _draw(dtype, device)(tokens, 320), packed, absmax, code, 100
        worst = max(worst, _difference(kernel(*tensors), reference.multiply(*tensors)))
    return worst


def _draw(dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *size: torch.randn(*size, generator=generator, device="cpu").to(device, dtype)


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    found = float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    return found if math.isfinite(found) else math.inf  # NaN would be lost in a maximum


def _line(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):  # of the launcher that Triton compiles in C for each kernel
        return "a C compiler failed (kernels are started by way of Python.h, which Debian has in python3-dev)"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
