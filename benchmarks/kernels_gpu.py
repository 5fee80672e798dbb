"""The kernels of a decode step on a GPU, beside what else computes them and their floors: a case of `serve_gpu`."""

import itertools
from collections.abc import Callable
from typing import Any

from benchmarks.machine import Meter, say


def kernel_speeds(rank: int, shape: dict[str, Any], load: Any, device: str, tiny: bool) -> dict[str, Any]:
    """Each kernel on the layers of this shape: microseconds, and how many times its floor in bytes that is."""
    import torch

    from adapterhub_local.base.attention import AttentionKind
    from adapterhub_local.base.load import import_bitsandbytes
    from serve.kernels import attention, lora, nf4
    from serve.lora.weights import plain_absmax

    bitsandbytes = import_bitsandbytes()
    dtype = torch.bfloat16
    speed = _copy_speed(device, 1 << (20 if tiny else 30))
    hidden, inside = shape["hidden_size"], shape["intermediate_size"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim = shape.get("head_dim", hidden // heads)
    groups = {
        "qkv": (hidden, (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)),
        "o": (heads * head_dim, (hidden,)),
        "gate_up": (hidden, (inside, inside)),
        "down": (inside, (hidden,)),
    }
    found: list[dict[str, Any]] = []

    def add(name: str, batch: int, different: int, num_bytes: int, work: Callable[[], object]) -> None:
        took = _microseconds(work, device)
        floor = num_bytes / speed * 1e6
        found.append(
            {
                "kernel": name,
                "batch": batch,
                "different": different,
                "microseconds": round(took, 1),
                "floor": round(floor, 2),
                "times_floor": round(took / floor, 1),
            }
        )
        if not tiny:
            say({"copy_bytes_per_second": round(speed), "kernels": found})

    for batch, adapters in itertools.product(load.batches, (each for each in load.adapters if each)):
        different = min(batch, adapters)
        for name, (in_features, sizes) in groups.items():
            a = torch.randn(different, in_features, len(sizes) * rank, device=device, dtype=dtype)
            bs = [torch.randn(different, rank, size, device=device, dtype=dtype) for size in sizes]
            x = torch.randn(batch, in_features, device=device, dtype=dtype)
            outs = [torch.zeros(batch, size, device=device, dtype=dtype) for size in sizes]
            tiles = torch.tensor([[row, 1, row % different] for row in range(batch)], dtype=torch.int32, device=device)
            moved = sum(each.nbytes for each in (a, *bs, x)) + 2 * sum(out.nbytes for out in outs)
            add(
                f"lora {name}",
                batch,
                different,
                moved,
                lambda o=outs, x=x, a=a, b=bs, t=tiles: lora.add_lora(o, x, a, b, t),
            )
    for batch, (name, (in_features, sizes)) in itertools.product(load.batches, groups.items()):
        weights = [_four_bit(size, in_features, device) for size in sizes]
        packed = torch.cat([each.flatten() for each, _ in weights])
        absmax, code = torch.cat([plain_absmax(state) for _, state in weights]), weights[0][1].code.float()
        x = torch.randn(batch, in_features, device=device, dtype=dtype)
        moved = packed.nbytes + absmax.nbytes + x.nbytes + batch * sum(sizes) * 2

        def own(
            x: Any = x, packed: Any = packed, absmax: Any = absmax, code: Any = code, size: int = sum(sizes)
        ) -> None:
            nf4.multiply(x, packed, absmax, code, size)

        def theirs(x: Any = x, weights: list = weights) -> None:
            for packed, state in weights:
                bitsandbytes.matmul_4bit(x, packed.t(), state)

        if nf4.why_not(x.device, dtype) is None:
            add(f"nf4 {name}", batch, 0, moved, own)
        add(f"nf4 {name}, bitsandbytes", batch, 0, moved, theirs)
        copy = torch.randn(sum(sizes), in_features, device=device, dtype=dtype)
        add(f"nf4 {name}, a copy in 16 bits", batch, 0, moved, lambda x=x, copy=copy: x @ copy.T)
    length = 64 if tiny else 2048
    for batch in load.batches:
        num_pages = length // 16
        keys, values = torch.randn(2, batch * num_pages, kv_heads, 16, head_dim, device=device, dtype=dtype)
        tables = torch.arange(batch * num_pages, dtype=torch.int32, device=device).view(batch, num_pages)
        lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        query = torch.randn(batch, heads, head_dim, device=device, dtype=dtype)
        moved = keys.nbytes + values.nbytes + 2 * query.nbytes
        add(
            f"attention over {length}", batch, batch, moved,
            lambda t=(query, keys, values, tables, lengths): attention.paged_attention(*t, AttentionKind(0.1)),
        )  # fmt: skip
    return {"copy_bytes_per_second": round(speed), "kernels": found}


def _four_bit(out_features: int, in_features: int, device: str) -> tuple[Any, Any]:
    """A random weight as a base holds it: NF4 in blocks of 64 with double quantisation."""
    import torch

    from adapterhub_local.base.load import import_bitsandbytes

    weight = torch.randn(out_features, in_features, device=device, dtype=torch.bfloat16)
    return import_bitsandbytes().functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )


def _copy_speed(device: str, size: int) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes."""
    import torch

    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _microseconds(lambda: target.copy_(source), device) * 1e6


def _microseconds(work: Callable[[], object], device: str) -> float:
    """The shortest time of some runs, caches cold, after one to compile: on a GPU its own time, without Python's."""
    import torch

    from serve.lora.crossover import gpu_seconds

    if device == "cuda":
        return 1e6 * gpu_seconds(work, torch.device(device))
    meter, times = Meter(device), []
    with torch.inference_mode():
        for _ in range(2):
            start = meter.now()
            work()
            times.append(meter.now() - start)
    return 1e6 * times[-1]
