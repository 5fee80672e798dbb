"""Steps of a CPU's engine: all in C, beside the model's code in torch around the same products, and the roofline.

    QHUB_HOME=... python -m benchmarks.steps [--dtype bfloat16] [--threads 1] [--adapters 8]

Each row is a batch: so many sequences with so many tokens to be read, after so many that are in the cache. With one
thread (the default) times are of the processor, so that other work on the machine counts little; with more, they are of
the clock and want a quiet machine. The roofline is measured first, in one thread: multiply-adds in registers, and
reading memory. It needs AVX-512; without that there is none.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.serve import load
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams, Scheduled
from serve.kernels.arena import Arena
from serve.kernels.compiled import find_compiler

BATCHES = ((1, 1, 100), (2, 1, 100), (4, 1, 100), (8, 1, 100), (16, 1, 100), (32, 1, 100), (1, 64, 0), (1, 256, 0))
RANK, PAGE = 16, 16


def roofline() -> dict[str, float]:
    """Rates of one core, in thousand millions a second; empty where they cannot be measured."""
    source = Path(__file__).with_name("roofline.c")
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/roofline.so"
        command = [*find_compiler(), "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", library]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return {}
        found = ctypes.CDLL(library)
        memory = torch.zeros(400 << 20, dtype=torch.uint8)
        huge = Arena().moved(memory)  # in pages as those of the weights

        def read(tensor: torch.Tensor) -> float:
            rate: float = found.read_rate(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(len(tensor)))
            return rate

        calls: dict[str, Callable[[], float]] = {
            "float32": lambda: found.float32_rate(ctypes.c_int64(20_000_000)),
            "bfloat16": lambda: found.bfloat16_rate(ctypes.c_int64(20_000_000)),
            "read_bytes": lambda: read(memory),
            "read_bytes_in_huge_pages": lambda: read(huge),
        }
        for name in ("float32_rate", "bfloat16_rate", "read_rate"):
            getattr(found, name).restype = ctypes.c_double
        return {name: round(max(call() for _ in range(5)) / 1e9, 1) for name, call in calls.items()}


def batch(rows: int, tokens: int, before: int, adapters: int) -> list[Scheduled]:
    """Sequences with random tokens, with the adapters by turns."""
    draw, pages = torch.Generator().manual_seed(rows), (before + tokens) // PAGE + 1
    found = []
    for number in range(rows):
        ids = torch.randint(3, 40_000, (before + tokens,), generator=draw).tolist()
        adapter = f"adapter-{number * adapters // rows}" if adapters else None
        own = list(range(1 + number * pages, 1 + (number + 1) * pages))
        request = Request(str(number), tuple(ids), SamplingParams(max_tokens=1), adapter, pages=own)
        found.append(Scheduled(request, before, tokens))
    return found


def shortest(work: Callable[[], Any], clock: Callable[[], float], repeat: int) -> float:
    times = []
    for _ in range(repeat + 1):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times[1:])


def measure(engine: Engine, items: list[Scheduled], clock: Callable[[], float], repeat: int) -> dict[str, float]:
    """Seconds of the step and of the model."""
    runner, found = engine.runner, {}
    slots = engine.slots.find({item.request.adapter for item in items if item.request.adapter})
    step = runner.fused
    for name, used in (("step", step), ("model", None)):
        runner.fused = used
        found[name] = shortest(lambda: runner.forward(items, slots), clock, repeat)
    runner.fused = step
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="of QHUB_HOME; default: the only one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, value in (("threads", 1), ("adapters", 0), ("repeat", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    rates = roofline()
    base = load(options)
    products = [each for each in base.model.modules() if isinstance(each, torch.nn.Linear)]
    weights = sum(each.in_features * each.out_features for each in products)
    head = base.model.get_output_embeddings()
    engine = build_engine(base, EngineOptions(max_rows=64, max_length=1024))
    for number in range(options.adapters):
        engine.slots.put(f"adapter-{number}", factors(engine), set())
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    rows = []
    for count, tokens, before in BATCHES:
        found = measure(engine, batch(count, tokens, before, min(count, options.adapters)), clock, options.repeat)
        products_done = count * tokens * (weights - head.in_features * head.out_features) + count * head.weight.numel()
        rate = products_done / found["step"] / 1e9 / options.threads
        share = round(rate / rates[options.dtype], 3) if rates.get(options.dtype) else None
        times = {name: round(1e3 * seconds, 2) for name, seconds in found.items()}
        done = {"multiply_adds": round(rate, 1), "share": share}
        rows.append({"rows": count, "tokens": tokens, "before": before, **times, **done})
        print(json.dumps(rows[-1]), file=sys.stderr)
    named = {name: getattr(options, name) for name in ("dtype", "threads", "adapters")}
    print(json.dumps({**named, "roofline": rates, "ms": rows, "machine": machine()}))


def factors(engine: Engine) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A random adapter of all layers but the output head."""
    layers = {name: layer for name, layer in engine.slots.layers.items() if name != "lm_head"}
    return {
        name: (
            torch.randn(layer.in_features, RANK) / layer.in_features**0.5,
            torch.randn(RANK, layer.out_features) / 99,
        )
        for name, layer in layers.items()
    }


if __name__ == "__main__":
    main()
