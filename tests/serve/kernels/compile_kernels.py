"""Compiles every kernel to machine code for GPUs of the capabilities named, none of which need be here.

`python -m tests.serve.kernels.compile_kernels 80 90` prints a line of JSON for each: kernel -> most bytes of shared
memory of one program. TRITON_INTERPRET must not be set.
"""

import argparse
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from serve.kernels import attention, lora, nf4

SLOTS, TOKENS, HIDDEN = 4, 6, 512


def compile_for(capability: int, calls: list[Callable[[], object]]) -> dict[str, int]:
    """Make all calls with kernels that are compiled for a GPU of this capability and not started."""
    target = GPUTarget("cuda", capability, 32)
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target
    )
    triton.runtime.driver.set_active(driver)
    shared: dict[str, int] = {}
    ordinary = JITFunction.run

    def only_compile(self, *args, grid, warmup, **settings):
        kernel = ordinary(self, *args, grid=grid, warmup=True, **settings)
        assert kernel.asm["cubin"]
        shared[self.__name__] = max(shared.get(self.__name__, 0), kernel.metadata.shared)
        return kernel

    JITFunction.run = only_compile
    try:
        for call in calls:
            call()
    finally:
        JITFunction.run = ordinary
    for each in (*vars(lora).values(), *vars(attention).values(), *vars(nf4).values()):
        if isinstance(each, JITFunction):
            each.device_caches.clear()  # what was compiled is for this capability
    return shared


def calls(dtype: torch.dtype) -> list[Callable[[], object]]:
    """Uses as they come: layers of one input, small and large ranks, head sizes, windows and caps."""
    tiles = torch.zeros(TOKENS, 3, dtype=torch.int32)
    x = torch.empty(TOKENS, HIDDEN, dtype=dtype)
    found: list[Callable[[], object]] = []
    for rank, sizes in ((16, (512, 128, 128)), (5, (100,)), (96, (1024, 1024))):
        a = torch.empty(SLOTS, HIDDEN, len(sizes) * rank, dtype=dtype)
        outs = [torch.empty(TOKENS, size, dtype=dtype) for size in sizes]
        bs = [torch.empty(SLOTS, rank, size, dtype=dtype) for size in sizes]
        found.append(lambda outs=outs, a=a, bs=bs: lora.add_lora(outs, x, a, bs, tiles))
    tables, lengths = torch.zeros(TOKENS, 40, dtype=torch.int32), torch.zeros(TOKENS, dtype=torch.int32)
    shapes = ((32, 128, None, None), (14, 64, 100, None), (16, 256, 4096, 50.0), (8, 80, None, None))
    for heads, head_dim, window, softcap in shapes:
        query = torch.empty(TOKENS, heads, head_dim, dtype=dtype)
        cache = torch.empty(2, 50, 2, 16, head_dim, dtype=dtype)
        found.append(
            lambda query=query, cache=cache, window=window, softcap=softcap: attention.paged_attention(
                query, *cache, tables, lengths, scale=0.1, window=window, softcap=softcap
            )
        )
    packed, absmax, code = torch.zeros(64 * HIDDEN // 2, 1, dtype=torch.uint8), torch.empty(64 * 8), torch.empty(16)
    for few in (torch.empty(1, HIDDEN, dtype=dtype), torch.empty(64, HIDDEN, dtype=dtype)):
        found.append(lambda few=few: nf4.multiply(few, packed, absmax, code, 64))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capabilities", nargs="+", type=int)
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    for capability in arguments.capabilities:
        most: dict[str, int] = {}
        for dtype in (getattr(torch, each) for each in arguments.dtype):
            for name, size in compile_for(capability, calls(dtype)).items():
                most[name] = max(most.get(name, 0), size)
        sys.stdout.write(json.dumps({"capability": capability, "shared": most}) + "\n")
