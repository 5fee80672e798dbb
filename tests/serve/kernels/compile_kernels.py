"""Compiles every kernel to machine code for GPUs of the capabilities named, none of which need be here.

`python -m tests.serve.kernels.compile_kernels 80 90` prints a line of JSON for each: kernel -> most bytes of shared
memory of one program, most registers and bytes of spills of a thread, most instructions, how many variants. Each
capability is compiled by a process of its own, since Triton keeps what it compiled by device, not by target. The 4-bit
product is among them where there is an NVRTC, as beside a torch for CUDA. TRITON_INTERPRET must not be set.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from adapterhub_local.base.attention import AttentionKind
from serve.kernels import attention, lora, nf4, pointwise
from serve.kernels.compiled import CannotCompile
from serve.kernels.nvrtc import compile_source

SLOTS, TOKENS, HIDDEN = 4, 6, 512
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compile_for(capability: int, calls: list[Callable[[], object]], *, is_counted: bool = True) -> dict[str, dict]:
    """Make all calls with kernels that are compiled for a GPU of this capability and not started."""
    target = GPUTarget("cuda", capability, 32)
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target
    )
    triton.runtime.driver.set_active(driver)
    found: dict[str, dict[bytes, dict[str, int]]] = {}
    ordinary = JITFunction.run

    def only_compile(self, *args, grid, warmup, **settings):
        kernel = ordinary(self, *args, grid=grid, warmup=True, **settings)
        cubin = kernel.asm["cubin"]
        assert cubin
        known = found.setdefault(self.__name__, {})
        if cubin not in known:
            # its shared memory is asked for at the launch, so that the code says nothing of it
            known[cubin] = {**(counts(cubin) if is_counted else {}), "shared": kernel.metadata.shared}
        return kernel

    JITFunction.run = only_compile
    try:
        for call in calls:
            call()
    finally:
        JITFunction.run = ordinary
    most: dict[str, dict] = {}
    for name, variants in found.items():
        rows = list(variants.values())
        most[name] = {"variants": len(rows), **{key: max(row[key] for row in rows) for key in rows[0]}}
    return most


def counts(cubin: bytes) -> dict[str, int]:
    """Bytes of shared memory, registers of a thread, bytes it spills, and instructions, by the tools of Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = [
            subprocess.run([TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        ]
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", said[0])}
    instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!.*\b(?:NOP|BRA `\(\.L_x_\d+\))\b).*;", said[1], re.M)
    return {
        "shared": usage["SHARED"],
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "instructions": len(instructions),
    }


def product(capability: int, dtypes: list[torch.dtype]) -> dict[str, object]:
    """The same of the 4-bit product for each number of tokens, in 16 bits; why not, where it cannot be compiled."""
    if (capability // 10, capability % 10) < nf4.OLDEST:
        return {"reason": "it is for GPUs of Ampere or later"}
    found: dict[str, object] = {}
    for tokens, variant in nf4.VARIANTS.items():
        try:
            cubins = [
                compile_source(nf4.SOURCE, str(capability), nf4.macros(variant, dtype))
                for dtype in dtypes
                if dtype in nf4.TYPES
            ]
        except CannotCompile as error:
            return {"reason": str(error)}
        rows = [counts(cubin) for cubin in cubins]
        found[f"up to {tokens}"] = {key: max(row[key] for row in rows) for key in rows[0]} if rows else {}
    return found


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
        kind = AttentionKind(0.1, window=window, softcap=softcap)
        query = torch.empty(TOKENS, heads, head_dim, dtype=dtype)
        cache = torch.empty(2, 50, 2, 16, head_dim, dtype=dtype)
        for width in (40, 8):  # pages of a row: parts that are joined, and one
            found.append(
                lambda query=query, cache=cache, kind=kind, width=width: attention.paged_attention(
                    query, *cache, tables[:, :width], lengths, kind
                )
            )
    return found + between(dtype)


def between(dtype: torch.dtype) -> list[Callable[[], object]]:
    """What lies between products, for heads of 128 with norms and of 64 without."""
    found: list[Callable[[], object]] = []
    places = torch.zeros(TOKENS, dtype=torch.int64), torch.zeros(TOKENS, dtype=torch.int64)
    for size, has_norms in ((128, True), (64, False)):
        mixed = torch.empty(TOKENS, 16 * size, dtype=dtype)
        q, k, v = (each.unflatten(-1, (-1, size)) for each in mixed.split([8 * size, 4 * size, 4 * size], dim=-1))
        angles = torch.empty(2, TOKENS, size, dtype=dtype)
        norms = (torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)) if has_norms else None
        cache = torch.empty(2, 50, 4, 16, size, dtype=dtype)
        found.append(
            lambda q=q, k=k, v=v, angles=angles, norms=norms, cache=cache: pointwise.rotate_and_write(
                q, k, v, tuple(angles), norms, 1e-6, tuple(cache), places
            )
        )
    for hidden in (2560, 8192):
        x, weight = torch.empty(TOKENS, hidden, dtype=dtype), torch.empty(hidden, dtype=dtype)
        found.append(lambda x=x, weight=weight: pointwise.add_norm(x, x, weight, 1e-6))
        found.append(lambda x=x: pointwise.silu_multiply(x, x))
    return found


def steps(dtype: torch.dtype = torch.bfloat16) -> list[Callable[[], object]]:
    """Steps of one model as traffic brings them: any number of rows, any length, with adapters of one rank."""
    found: list[Callable[[], object]] = []
    a, b = torch.empty(SLOTS, HIDDEN, 16, dtype=dtype), torch.empty(SLOTS, 16, 512, dtype=dtype)
    cache = torch.empty(2, 50, 8, 16, 128, dtype=dtype)
    for rows in (1, 2, 3, 5, 7, 16, 17, 31, 32, 40, 64):
        for width in (1, 3, 16, 20, 33, 64, 129, 256):
            tables, lengths = torch.zeros(rows, width, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
            x, out = torch.empty(rows, HIDDEN, dtype=dtype), torch.empty(rows, 512, dtype=dtype)
            query, tiles = torch.empty(rows, 32, 128, dtype=dtype), torch.zeros(rows, 3, dtype=torch.int32)
            found += [
                lambda q=query, t=tables, n=lengths: attention.paged_attention(q, *cache, t, n, AttentionKind(0.1)),
                lambda out=out, x=x, tiles=tiles: lora.add_lora([out], x, a, [b], tiles),
                lambda x=x, out=out: pointwise.add_norm(x, out, x[0], 1e-6),
                lambda out=out: pointwise.silu_multiply(out, out),
            ]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capabilities", nargs="+", type=int)
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--steps", action="store_true", help="steps of one model, to see how many variants they need")
    arguments = parser.parse_args()
    if len(arguments.capabilities) > 1:
        for each in arguments.capabilities:
            options = ["--dtype", *arguments.dtype, *(["--steps"] if arguments.steps else [])]
            subprocess.run([sys.executable, "-m", __spec__.name, str(each), *options], check=True)
        sys.exit()
    (capability,) = arguments.capabilities
    dtypes = [getattr(torch, each) for each in arguments.dtype]
    wanted = [call for dtype in dtypes for call in calls(dtype)]
    result = compile_for(capability, steps() if arguments.steps else wanted, is_counted=not arguments.steps)
    versions = {"triton": triton.__version__, "product": {} if arguments.steps else product(capability, dtypes)}
    sys.stdout.write(json.dumps({"capability": capability, "kernels": result, **versions}) + "\n")
