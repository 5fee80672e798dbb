"""Serving speed: our engine beside PEFT's `adapter_names` and transformers' continuous batching, on the same NF4 base.

    python -m benchmarks.serve [--rows 16] [--adapters 8] [--rank 16] [--prompt 64] [--tokens 48] [--rounds 2]
    python -m benchmarks.serve --only many [--registered 2000] [--active 200]

The same requests for all: greedy, random prompts of one length, answers of one length, random adapters on every linear
layer. Tokens a second are of the answers, prompts included in the time. Each side is a process of its own, in turn.
PEFT answers them as one batch of `generate`; continuous batching knows no adapters and is asked for the base alone.
`--only many` asks 2,000 registered adapters, 200 of them active with popularity as in Zipf's law, beside one adapter.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapterhub_local.settings import wait_briefly
from benchmarks.machine import child, machine, peak_memory_mb

CONCURRENCY = (1, 2, 4, 8, 16, 32)
ZIPF = 1.0


def prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random tokens, the same every time."""
    return [random.Random(number).choices(range(100, vocabulary), k=length) for number in range(count)]


def load(options: argparse.Namespace) -> Any:
    """The base that QHUB_HOME has, in the dtype asked for."""
    import torch

    from adapterhub_local.base.bases import choose_base
    from adapterhub_local.base.load import load_base
    from adapterhub_local.settings import home

    if options.threads:
        torch.set_num_threads(options.threads)
    return load_base(choose_base(options.base, home(), "the benchmark"), dtype=getattr(torch, options.dtype))


def registry(options: argparse.Namespace) -> Any:
    from adapterhub_local.registry import Registry
    from adapterhub_local.settings import home

    return Registry(home(options.folder))


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Register the adapters, random ones of which no two are alike."""
    import torch

    from adapterhub_local.lora.config import AdapterConfig
    from adapterhub_local.lora.write import tensor_name, write_adapter

    base = load(options)
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not base.model.get_output_embeddings()
    }
    count = options.registered if options.only == "many" else options.adapters
    targets = tuple(sorted({name.rpartition(".")[2] for name in linears}))
    config = AdapterConfig(rank=options.rank, alpha=2.0 * options.rank, target_modules=targets)
    store = registry(options)
    lineage = {"base": base.info.lineage()}
    active = options.active if options.only == "many" else count
    for number in range(min(active, count)):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, (inputs, outputs) in linears.items():
            tensors[tensor_name(name, "A")] = torch.randn(options.rank, inputs, generator=generator) / inputs**0.5
            tensors[tensor_name(name, "B")] = torch.randn(outputs, options.rank, generator=generator) * 0.005
        entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with tempfile.TemporaryDirectory(dir=options.folder) as stage:
            files = write_adapter(Path(stage), config, entries, tensors.items(), base.info.fingerprint)
            store.publish(f"a{number}", files, lineage)
    spare = store.resolve("a0").path
    for number in range(active, count):  # never asked for: their bytes are those of the first, which saves 30 GB
        store.publish(f"a{number}", {file.name: file for file in spare.iterdir()}, lineage)
    return {"adapters": count}


def engine_for(options: argparse.Namespace, rows: int, base: Any) -> Any:
    from serve.engine.build import build_engine
    from serve.engine.options import EngineOptions

    settings = EngineOptions(
        max_rows=rows,
        max_length=options.prompt + options.tokens,
        base_exec=options.base_exec,
        kernels=options.kernels,
        queue_limit=1 << 20,
        adapter_bytes=8 << 30,
        prefix_bytes=0,  # the same prompts come again, for which the baselines remember nothing
    )
    return build_engine(base, settings)


def answer(engine: Any, texts: Sequence[list[int]], versions: Sequence[Any], tokens: int) -> tuple[float, list]:
    """Seconds until all of these requests, sent at once, are answered, and the answers."""
    from serve.engine.request import Request, SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0)
    requests = [
        Request(str(number), tuple(text), params, engine.pool.acquire(version).digest if version else None)
        for number, (text, version) in enumerate(zip(texts, versions, strict=True))
    ]
    start = time.perf_counter()
    engine.submit(*requests)
    while engine.has_work:
        for output in engine.step():
            if output.error:
                raise output.error
    return time.perf_counter() - start, [request.output for request in requests]


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """All adapters, one adapter and the base alone, in turn; then 1 to 32 at once."""
    wait_briefly()  # as `qhub serve` does
    base = load(options)
    store = registry(options)
    versions = [store.resolve(f"a{number}") for number in range(options.adapters)]
    rows = max(options.rows, *CONCURRENCY)
    engine = engine_for(options, rows, base)
    texts = prompts(rows, options.prompt, base.model.config.vocab_size)
    kinds = {
        "different": [versions[number % len(versions)] for number in range(rows)],
        "identical": [versions[0]] * rows,
        "base": [None] * rows,
    }
    answer(engine, texts[: options.rows], kinds["different"][: options.rows], 2)  # warms up, fills the slots
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    answers: dict[str, list] = {}
    for _ in range(options.rounds):
        for kind, chosen in kinds.items():
            took, answers[kind] = answer(engine, texts[: options.rows], chosen[: options.rows], options.tokens)
            seconds[kind].append(took)
    same = peak_memory_mb()  # of what PEFT is asked, too
    curve = {
        count: min(
            answer(engine, texts[:count], kinds["different"][:count], options.tokens)[0] for _ in range(options.rounds)
        )
        for count in CONCURRENCY
    }
    speed = {
        kind: round(options.rows * options.tokens / statistics.median(taken), 1) for kind, taken in seconds.items()
    }
    return {
        "tokens_per_second": speed,
        "cost_of_adapters": round(1 - speed["different"] / speed["base"], 3),
        "by_concurrency": {count: round(count * options.tokens / took, 1) for count, took in curve.items()},
        "peak_memory_mb": same,
        "peak_memory_mb_with_32": peak_memory_mb(),
        "answers": answers,
    }


def unwrapped(options: argparse.Namespace) -> dict[str, Any]:
    """The base alone through our engine, its layers wrapped and as they were by turns, step by step, so that what
    else the machine does hits both: what adapters cost that nobody uses. Median of the steps' ratios."""
    from serve.engine.request import Request, SamplingParams
    from serve.lora.linear import unwrap_linears

    base = load(options)
    options.base_exec = "nf4"  # the unwrapped layers know no other way
    engine = engine_for(options, options.rows, base)
    model, layers = engine.runner.model, engine.slots.layers
    params = SamplingParams(max_tokens=options.tokens, temperature=0)
    texts = prompts(options.rows, options.prompt, model.config.vocab_size)
    ratios: list[float] = []
    for turn in range(max(2, options.rounds)):
        engine.submit(*(Request(f"{turn} {row}", tuple(text), params) for row, text in enumerate(texts)))
        seconds = []
        while engine.has_work:
            is_plain = (len(seconds) + turn) % 2
            if is_plain:
                unwrap_linears(model, layers)
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)
            if is_plain:
                for name, layer in layers.items():
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, layer)
        decode = seconds[-(options.tokens - 4) :]  # the first of them warm up
        pairs = [
            pair[::-1] if (place + len(seconds) - len(decode) + turn) % 2 else pair
            for place, pair in enumerate(itertools.pairwise(decode))
        ]
        ratios += [wrapped / plain for wrapped, plain in pairs]
    return {"cost_when_none_is_active": round(statistics.median(ratios) - 1, 4)}


def peft_batch(options: argparse.Namespace) -> Any:
    """A function of the number of tokens that answers the requests as one batch of `generate`, each with its adapter
    or, where `is_base`, with none: seconds, and the answers."""
    import torch
    from peft import PeftModel

    base = load(options)
    store = registry(options)
    names = [f"a{number}" for number in range(options.adapters)]
    model = PeftModel.from_pretrained(base.model, store.resolve(names[0]).path, adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(store.resolve(name).path, adapter_name=name)
    model.eval()
    input_ids = torch.tensor(prompts(options.rows, options.prompt, base.model.config.vocab_size))

    def run(tokens: int, *, is_base: bool = False) -> tuple[float, list]:
        chosen = ["__base__" if is_base else names[number % len(names)] for number in range(options.rows)]
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                adapter_names=chosen,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return time.perf_counter() - start, out[:, options.prompt :].tolist()

    return run


def peft(options: argparse.Namespace) -> dict[str, Any]:
    """One batch of `generate` with `adapter_names`, and the same with no adapter."""
    run = peft_batch(options)
    run(2)
    kinds = {"different": False, "base": True}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    answers = {}
    for _ in range(options.rounds):
        for kind, is_base in kinds.items():
            took, answers[kind] = run(options.tokens, is_base=is_base)
            seconds[kind].append(took)
    speed = {
        kind: round(options.rows * options.tokens / statistics.median(taken), 1) for kind, taken in seconds.items()
    }
    return {"tokens_per_second": speed, "peak_memory_mb": peak_memory_mb(), "answers": answers}


def continuous(options: argparse.Namespace) -> dict[str, Any]:
    """transformers' continuous batching, base alone."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    base = load(options)
    base.model.set_attn_implementation("sdpa")
    length = options.prompt + options.tokens
    config = ContinuousBatchingConfig(num_blocks=options.rows * (length // 32 + 2), page_size=32, max_batch_tokens=512)
    texts = prompts(options.rows, options.prompt, base.model.config.vocab_size)

    def run(tokens: int) -> float:
        generation = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0)
        start = time.perf_counter()
        results = base.model.generate_batch(
            texts, generation_config=generation, continuous_batching_config=config, warmup=False
        )
        if sum(len(result.generated_tokens) for result in results.values()) != len(texts) * tokens:
            raise RuntimeError("continuous batching gave other than the tokens asked for")
        return time.perf_counter() - start

    run(2)
    taken = statistics.median(run(options.tokens) for _ in range(options.rounds))
    return {
        "tokens_per_second": {"base": round(options.rows * options.tokens / taken, 1)},
        "peak_memory_mb": peak_memory_mb(),
    }


def many(options: argparse.Namespace) -> dict[str, Any]:
    """A closed loop of `rows` users over many adapters, most popular first, beside the same over one adapter."""
    base = load(options)
    store = registry(options)
    engine = engine_for(options, options.rows, base)
    active = min(options.active, options.registered)
    weights = [1 / (place + 1) ** ZIPF for place in range(active)]
    count = options.rows * options.requests
    texts = prompts(count, options.prompt, base.model.config.vocab_size)
    chosen = random.Random(0).choices(range(active), weights, k=count)
    speeds = {}
    for kind, numbers in (("one", [0] * count), ("many", chosen), ("many again", chosen)):
        speeds[kind] = closed_loop(engine, texts, [store.resolve(f"a{number}") for number in numbers], options)
    return {
        "tokens_per_second": speeds,
        "below_one_adapter": round(1 - speeds["many again"] / speeds["one"], 3),
        "different": len(set(chosen)),
        "loads": engine.pool.num_loads,
        "slot_loads": engine.slots.num_loads,
        "peak_memory_mb": peak_memory_mb(),
    }


def closed_loop(engine: Any, texts: Sequence[list[int]], versions: Sequence[Any], options: argparse.Namespace) -> float:
    """Tokens a second with as many requests at once as there are rows, each followed by the next."""
    from concurrent.futures import Future, ThreadPoolExecutor

    from serve.engine.request import Request, SamplingParams
    from serve.threads import compute_alone

    params = SamplingParams(max_tokens=options.tokens, temperature=0)
    start = time.perf_counter()
    with ThreadPoolExecutor(
        2, initializer=compute_alone
    ) as loaders:  # adapters are read beside the steps, as in the server
        todo = list(enumerate(zip(texts, versions, strict=True)))[::-1]
        loading: list[tuple[int, list[int], Future]] = []
        live = 0
        while todo or loading or live:
            while todo and live + len(loading) < 2 * options.rows:
                number, (text, version) = todo.pop()
                loading.append((number, text, loaders.submit(engine.pool.acquire, version)))
            ready = [item for item in loading if item[2].done()]
            loading = [item for item in loading if not item[2].done()]
            for number, text, held in ready:
                engine.submit(Request(str(number), tuple(text), params, held.result().digest))
                live += 1
            if not live:
                time.sleep(0.001)
            live -= sum(output.is_last for output in engine.step())
    return round(len(texts) * options.tokens / (time.perf_counter() - start), 1)


def agreement(left: list[list[int]], right: list[list[int]]) -> float:
    """Share of answers that are the same, token by token."""
    return sum(a == b for a, b in zip(left, right, strict=True)) / len(left)


def report(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Run the sides one after the other and put them beside each other."""

    def side(name: str) -> dict[str, Any]:
        return child("-m", "benchmarks.serve", *options.arguments, "--side", name, "--folder", folder)

    side("prepare")
    workload = {
        name: getattr(options, name)
        for name in ("rows", "adapters", "rank", "prompt", "tokens", "dtype", "rounds", "kernels")
    }
    head = {"benchmark": "serve", "machine": machine(), "workload": workload}
    if options.only == "many":
        return {**head, "registered": options.registered, "active": options.active, "ours": side("many")}
    mine, theirs, batching = side("ours"), side("peft"), side("continuous")
    answers, wanted = mine.pop("answers"), theirs.pop("answers")
    return {
        **head,
        "ours": {**mine, **side("unwrapped")},
        "baseline": {"name": "PEFT adapter_names", **theirs},
        "continuous_batching": {"name": "transformers continuous batching, base alone", **batching},
        "same_answers_as_peft": {kind: agreement(answers[kind], wanted[kind]) for kind in wanted},
        "ratio_to_peft": round(mine["tokens_per_second"]["different"] / theirs["tokens_per_second"]["different"], 2),
        "ratio_to_continuous_batching": round(
            mine["tokens_per_second"]["base"] / batching["tokens_per_second"]["base"], 2
        ),
    }


SIDES = {each.__name__: each for each in (prepare, ours, unwrapped, peft, continuous, many)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 16), ("adapters", 8), ("rank", 16), ("prompt", 64), ("tokens", 48), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("registered", 2000), ("active", 200), ("requests", 10), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--base-exec", default="auto", choices=("auto", "nf4", "dequant-cache"))
    parser.add_argument("--kernels", default="auto", choices=("auto", "triton", "c", "torch"))
    parser.add_argument("--base", help="the base to measure on; default: the only one there is")
    parser.add_argument("--only", choices=("many",))
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--folder", type=Path)
    options, _ = parser.parse_known_args()
    if options.side:
        print(json.dumps(SIDES[options.side](options)))
        return
    import sys

    options.arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(report(options, folder)))


if __name__ == "__main__":
    from adapterhub_local.noise import hush

    hush()
    main()
