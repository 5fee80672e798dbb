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
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels_gpu import kernel_speeds
from benchmarks.machine import Meter, kernel_times, run_cases, say
from benchmarks.train_gpu import SHAPES, TINY, random_base

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

    @contextmanager
    def holding(self, digest: str) -> Iterator[dict[str, tuple[Any, Any]]]:
        """The factors of adapter number `digest`, drawn anew each time; too weak to change what is measured."""
        import torch

        generator = torch.Generator(self.device).manual_seed(int(digest))

        def draw(*size: int) -> Any:
            return torch.randn(*size, generator=generator, device=self.device, dtype=self.dtype) * 0.01

        yield {name: (draw(inside, self.rank), draw(self.rank, out)) for name, (inside, out) in self.shapes.items()}

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


def step_times(engine: Any, requests: list[Any], steps: int = 8) -> dict[str, Any]:
    """What `kernel_times` finds of one step. The requests end afterwards."""
    found = kernel_times(lambda: _step(engine), steps)
    while not all(request.finish_reason for request in requests):
        _step(engine)
    return found


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
                each: step_times(engine, start_batch(engine, each, adapters, load)) for each in (64, 1)
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


def measure(case: Case, device: str, tiny: bool) -> dict[str, Any]:
    """One case."""
    from adapterhub_local.noise import hush

    hush()
    shape, load = ({**TINY, "num_hidden_layers": 1}, SMALL) if tiny else (BASES[case.base], REAL)
    if case.kind == "kernels":
        return {"case": case.name, **kernel_speeds(case.rank, shape, load, device, tiny)}
    work = {"ours": ours, "plain": ours, "peft": peft}[case.kind]
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
