"""What all kernels share: a product on tensor cores, and how many programs keep a GPU busy."""

import torch
import triton
import triton.language as tl

BUSY = 264  # two programs for each of the 132 multiprocessors of an H100 or H200
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on the CPU, program by program, for tests


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """total + left @ right, in float32. Triton's interpreter has no products of bfloat16: it gets them widened."""
    if PRECISION == "interpreted":
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:  # noqa: RET505 (a compile-time branch: what follows a return would be compiled too)
        return tl.dot(left, right, total, input_precision=PRECISION)


def precision(dtype: torch.dtype) -> str:
    """How `dot` multiplies: float32 in full, not rounded to 10 bits as tensor cores would."""
    if INTERPRETED:
        return "interpreted"
    return "ieee" if dtype == torch.float32 else "tf32"
