"""Serving on one GPU: tokens a second with no, one and many adapters, each kernel against its floor, beside PEFT.

    python -m benchmarks.serve_gpu                       # all cases
    python -m benchmarks.serve_gpu --only qwen3-4b-r32 --minutes 9 --out serve.json   # some, within a time, in a file
    python -m benchmarks.serve_gpu --device cpu --tiny   # the same code on tiny shapes, to see that it runs

Bases of the real shape in NF4 with random weights, made layer by layer on the GPU, and random adapters on all linear
layers: speed and memory do not depend on their values. Tokens a second are of decoding, prompts read before. A floor
is the time that the bytes a kernel must move take at the speed of a large copy, measured in the same run. Each case
is a process of its own.
"""

import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.machine import run_cases
from benchmarks.train_gpu import SHAPES, TINY, Meter, random_base

QWEN3_4B = {
    "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip
BASES = {"qwen3-4b": QWEN3_4B, "llama-8b": SHAPES["8b"]}
BATCHES = (64, 1, 8, 32, 16, 4, 2)  # what is most worth knowing first
# tokens a second at batch 64, rank 32, NF4, Qwen3-4B shape: own engine at 41 GB and vLLM (unslothai/unsloth#5108, B200)
FLOOR, MOONSHOT = 1738, 4515


@dataclass(frozen=True)
class Case:
    """`kind`: `ours` is the engine, `plain` the engine without kernels and graphs, `peft` its own loop; `kernels`."""

    base: str
    rank: int
    kind: str

    @property
    def name(self) -> str:
        return f"{self.base}-r{self.rank}-{self.kind}"


CASES = tuple(
    Case(base, rank, kind)
    for base, rank, kind in itertools.product(BASES, (32, 16), ("ours", "kernels", "peft", "plain"))
)


@dataclass(frozen=True)
class Load:
    """What one case asks for: prompts of `prompt` tokens, answers of `tokens`, in these batches, of these adapters."""

    batches: tuple[int, ...]
    adapters: tuple[int, ...]
    prompt: int
    tokens: int


REAL = Load(BATCHES, (1, 0, 8, 64), 128, 64)
LONG = Load((64, 1), (1, 0), 2048, 64)  # where attention reads as much as the products do
SMALL = Load((2,), (2, 0), 4, 2)


class DrawnPool:
    """Adapters of random factors on the device, in the place of the engine's pool: none is read from disk."""

    def __init__(self, records: Any, shapes: dict[str, tuple[int, int]], rank: int, dtype: Any, device: Any) -> None:
        self.records, self.shapes, self.rank, self.dtype, self.device = records, shapes, rank, dtype, device

    def get(self, digest: str) -> dict[str, tuple[Any, Any]]:
        """The factors of adapter number `digest`, drawn anew each time; too weak to change what is measured."""
        import torch

        generator = torch.Generator(self.device).manual_seed(int(digest))

        def draw(*size: int) -> Any:
            return torch.randn(*size, generator=generator, device=self.device, dtype=self.dtype) * 0.01

        return {name: (draw(inside, self.rank), draw(self.rank, out)) for name, (inside, out) in self.shapes.items()}

    def release(self, digest: str) -> None:
        """Nothing is held."""


def engine_for(case: Case, shape: dict[str, Any], load: Load, device: str, tiny: bool) -> Any:
    """The engine over a random base, its adapters drawn."""
    import torch

    from adapterhub_local.base.bases import BaseInfo
    from adapterhub_local.base.load import LoadedBase
    from serve.engine.build import build_engine
    from serve.engine.options import EngineOptions

    info = BaseInfo.__new__(BaseInfo)
    for name, value in {"name": "random", "fingerprint": "random"}.items():
        object.__setattr__(info, name, value)
    base = LoadedBase(info=info, model=random_base(shape, device), tokenizer=None)  # type: ignore[arg-type]
    is_plain = case.kind == "plain"
    options = EngineOptions(
        max_rows=max(load.batches),
        max_adapters=max(load.adapters),
        max_length=(load if tiny else LONG).prompt + load.tokens,
        tokens_per_step=4096,
        prefix_bytes=0,
        base_exec="auto" if device == "cuda" else "nf4",
        kernels="torch" if is_plain else "triton" if tiny else "auto",
        cuda_graphs=not is_plain,
    )
    engine = build_engine(base, options)
    shapes = {
        name: (layer.in_features, layer.out_features)
        for name, layer in engine.slots.layers.items()
        if layer.base is not base.model.get_output_embeddings()
    }
    drawn = DrawnPool(engine.slots.records, shapes, case.rank, base.model.dtype, torch.device(device))
    engine.pool = engine.loader.pool = drawn  # type: ignore[assignment]
    return engine


def start_batch(engine: Any, batch: int, adapters: int, load: Load) -> list[Any]:
    """Requests of `adapters` different adapters, whose prompts have been read."""
    import torch

    from serve.engine.request import Request, SamplingParams

    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(engine.runner.model.config.vocab_size, (batch, load.prompt), generator=generator).tolist()
    params = SamplingParams(max_tokens=load.tokens, temperature=0)
    requests = [
        Request(str(row), tuple(text), params, str(row % adapters) if adapters else None)
        for row, text in enumerate(texts)
    ]
    for row in range(adapters):
        engine.pool.records.make(str(row))
    engine.submit(*requests)
    while not all(request.output for request in requests):
        _step(engine)
    return requests


def decode(engine: Any, batch: int, adapters: int, load: Load, meter: Meter) -> float:
    """Tokens a second of a batch whose rows have `adapters` different adapters, once all prompts are read."""
    requests = start_batch(engine, batch, adapters, load)
    start, before = meter.now(), sum(len(request.output) for request in requests)
    while engine.has_work:
        _step(engine)
    took = meter.now() - start
    return (sum(len(request.output) for request in requests) - before) / took


def _step(engine: Any) -> None:
    for output in engine.step():
        if output.error:
            raise output.error


def kernel_times(step: Callable[[], None], requests: list[Any], steps: int = 8, most: int = 24) -> dict[str, Any]:
    """Of one step, the mean of `steps`: milliseconds on the clock, of the GPU's kernels, and of the costliest of them
    with how often they ran. The requests end afterwards."""
    import time

    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    clock = 1e3 * (time.perf_counter() - start) / steps
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    rows = [
        (each.self_device_time_total / 1e3 / steps, each.count / steps, each.key) for each in profile.key_averages()
    ]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    while not all(request.finish_reason for request in requests):
        step()
    return {
        "clock": round(clock, 3),
        "kernels": round(sum(row[0] for row in rows), 3),
        "launches": round(sum(row[1] for row in rows)),
        "costliest": [[name[:80], round(times), round(took, 4)] for took, times, name in rows[:most]],
    }


def ours(case: Case, shape: dict[str, Any], load: Load, device: str, tiny: bool) -> dict[str, Any]:
    """The engine at every batch size, with each number of different adapters."""
    from serve.lora.ways import chosen

    meter = Meter(device)
    engine = engine_for(case, shape, load, device, tiny)
    speeds: dict[str, dict[int, float]] = {}
    found: dict[str, Any] = {"tokens_per_second": speeds}
    meter.reset()
    for adapters in load.adapters:
        speeds[str(adapters)] = {}
        for batch in load.batches:
            if not tiny:
                decode(engine, batch, adapters, load, meter)  # fills slots, compiles, captures
            runs = [decode(engine, batch, adapters, load, meter) for _ in range(1 if tiny else 3)]
            speeds[str(adapters)][batch] = round(statistics.median(runs), 1)
            found |= {**meter.peak(), "kernels": engine.runner.kernels}
            if not tiny:
                say(found)
        if not tiny and "milliseconds_of_a_step" not in found:
            found["milliseconds_of_a_step"] = {
                each: kernel_times(lambda: _step(engine), start_batch(engine, each, adapters, load)) for each in (64, 1)
            }
    most = max(load.batches)
    found |= {
        "cost_of_adapters": {many: round(1 - speeds[many][most] / speeds["0"][most], 3) for many in speeds},
        "base_products": chosen(engine.slots.groups),
    }
    if not tiny:
        say(found)
        long = {str(each): {} for each in LONG.adapters}  # type: dict[str, dict[int, float]]
        for adapters, batch in itertools.product(LONG.adapters, LONG.batches):
            decode(engine, batch, adapters, LONG, meter)
            long[str(adapters)][batch] = round(decode(engine, batch, adapters, LONG, meter), 1)
        found[f"tokens_per_second_behind_{LONG.prompt}"] = long
    return {
        **found,
        "kernels": engine.runner.kernels,
        "cuda_graphs": len(engine.runner.graphs or ()),
        "graphs_failed": engine.runner.graphs.reason if engine.runner.graphs else None,
    }


def peft(case: Case, shape: dict[str, Any], load: Load, device: str, tiny: bool) -> dict[str, Any]:
    """transformers' `generate` with PEFT's `adapter_names`: the time of a long answer less that of a short one."""
    import torch
    from peft import LoraConfig, get_peft_model

    meter = Meter(device)
    config = LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(random_base(shape, device), config, adapter_name="0")
    meter.reset()
    speeds: dict[str, dict[int, float]] = {}
    for adapters in sorted(load.adapters):
        for number in range(len(model.peft_config), adapters):
            model.add_adapter(str(number), config)
        model.eval()
        speeds[str(adapters)] = {}
        for batch in load.batches[:3]:  # each takes long
            ids = torch.randint(2, shape["vocab_size"], (batch, load.prompt), device=device)
            names = [str(row % adapters) if adapters else "__base__" for row in range(batch)]

            def seconds(tokens: int, ids: Any = ids, names: list[str] = names) -> float:
                start = meter.now()
                with torch.inference_mode():
                    model.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, do_sample=False,
                        max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0,
                    )  # fmt: skip
                return meter.now() - start

            long = min(load.tokens, 17)
            seconds(2)
            took = seconds(long) - seconds(1)
            speeds[str(adapters)][batch] = round(batch * (long - 1) / took, 1)
            if not tiny:
                say({**meter.peak(), "tokens_per_second": speeds})
    return {**meter.peak(), "tokens_per_second": speeds}


def kernels(case: Case, shape: dict[str, Any], load: Load, device: str, tiny: bool) -> dict[str, Any]:
    """Each kernel on the layers of this shape: microseconds, and how many times its floor in bytes that is."""
    import torch

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
            a = torch.randn(different, in_features, len(sizes) * case.rank, device=device, dtype=dtype)
            bs = [torch.randn(different, case.rank, size, device=device, dtype=dtype) for size in sizes]
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
        states = [(packed, plain_absmax(state), state.code) for packed, state in weights]
        x = torch.randn(batch, in_features, device=device, dtype=dtype)
        moved = sum(packed.nbytes + absmax.nbytes for packed, absmax, _ in states) + x.nbytes + batch * sum(sizes) * 2

        def own(x: Any = x, states: list = states, sizes: tuple[int, ...] = sizes) -> None:
            for state, size in zip(states, sizes, strict=True):
                nf4.multiply(x, *state, size)

        def theirs(x: Any = x, weights: list = weights) -> None:
            for packed, state in weights:
                bitsandbytes.matmul_4bit(x, packed, state)

        add(f"nf4 {name}", batch, 0, moved, own)
        add(f"nf4 {name}, bitsandbytes", batch, 0, moved, theirs)
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
            lambda t=(query, keys, values, tables, lengths): attention.paged_attention(*t, scale=0.1),
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


def say(result: dict[str, Any]) -> None:
    """What is known so far, for the parent process, should this one not come to its end."""
    print(json.dumps(result), flush=True)


def measure(case: Case, device: str, tiny: bool) -> dict[str, Any]:
    """One case."""
    from adapterhub_local.noise import hush

    hush()
    shape, load = ({**TINY, "num_hidden_layers": 1}, SMALL) if tiny else (BASES[case.base], REAL)
    work = {"ours": ours, "plain": ours, "peft": peft, "kernels": kernels}[case.kind]
    return {"case": case.name, **work(case, shape, load, device, tiny)}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What all cases together show."""
    speeds = {result["case"]: result.get("tokens_per_second", {}) for result in results}

    def at_most(kind: str) -> float | None:  # batch and one adapter, as in the threads that the targets come from
        found = speeds.get(f"qwen3-4b-r32-{kind}", {}).get("1", {})
        return found.get(64) or found.get("64")

    ours_speed, peft_speed = at_most("ours"), at_most("peft")
    return {
        "benchmark": "serve_gpu",
        "workload": f"random NF4 weights of the real shape, adapters on all linear layers, bfloat16, {REAL}",
        "ours": ours_speed,
        "baseline": {"name": "transformers generate + PEFT adapter_names", "tokens_per_second": peft_speed},
        "ratio_tokens_per_second": round(ours_speed / peft_speed, 2) if ours_speed and peft_speed else None,
        "targets": {"floor": FLOOR, "moonshot": MOONSHOT},
    }


def main() -> None:
    run_cases("benchmarks.serve_gpu", CASES, measure, summary, __doc__)


if __name__ == "__main__":
    main()
