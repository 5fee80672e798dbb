"""From how many tokens on which way of computing W x is the faster one, measured where it runs.

In processor time of one thread, so that what else the machine does at that moment decides nothing, and with weights
that are not in the processor's cache, since a step finds none there.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from serve.lora.linear import LinearGroup, Product
from serve.threads import compute_alone

# numbers of tokens at which a copy, or a GPU's kernel, is tried; beyond the largest the winner there stays the winner
PROBES = (1, 4, 16, 64)
REPEATS = 3
CACHE = 64 << 20  # bytes that are written to push weights out of a CPU's cache


@torch.inference_mode()
def gain(group: LinearGroup, dtype: torch.dtype, other: Product) -> tuple[float, int]:
    """Seconds that `other` saves over all probes where it pays, and the least tokens from which it does."""
    assert group.dense is None, "what is measured here is the layers' own way"
    saved, min_tokens = 0.0, PROBES[-1] + 1
    for count in reversed(PROBES):
        own, others = race((group.base_products, other), drawn_input(group, count, dtype))
        if own <= others:
            break
        saved, min_tokens = saved + own - others, count
    return saved, min_tokens


def race(works: Sequence[Product], x: torch.Tensor) -> list[float]:
    """The shortest time in seconds of each of `works` on x, after one run to warm up."""
    if x.device.type == "cuda":
        return [gpu_seconds(partial(work, x), x.device) for work in works]
    with ThreadPoolExecutor(1, initializer=compute_alone) as alone:
        return alone.submit(_cpu_seconds, works, x).result()


def drawn_input(group: LinearGroup, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers (1, count, in_features) where the group's weights are, the same every time."""
    # not zeros: a GPU that multiplies nothing draws less power and runs faster than it will
    numbers = torch.randn(1, count, group.in_features, generator=torch.Generator().manual_seed(count))
    return numbers.to(group.bases[0].weight.device, dtype)


@torch.inference_mode()
def _cpu_seconds(works: Sequence[Product], x: torch.Tensor) -> list[float]:
    other = torch.empty(CACHE, dtype=torch.uint8)
    best = [float("inf")] * len(works)
    for number in range(REPEATS + 1):
        for place, work in enumerate(works):
            other.zero_()
            start = time.thread_time()
            work(x)
            if number:
                best[place] = min(best[place], time.thread_time() - start)
    return best


def gpu_seconds(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The same in the GPU's own time: of what Python takes to launch its kernels a replayed step knows nothing.

    What is zeroed before is larger than the GPU's cache, in which no step finds its weights, and keeps the GPU busy
    (a third of a millisecond on an H100) while the kernels are launched.
    """
    work()
    other = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        for _ in range(4):
            other.zero_()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return float(min(start.elapsed_time(end) for start, end in events)) / 1000
