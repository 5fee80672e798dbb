"""How long a step gets while cold adapters come: the longest steps with and without them, in one run.

    python -m benchmarks.serve_cold [--rows 16] [--rank 16] [--steps 60] [--every 5] [--threads 1]

`rows` requests of 8 adapters run all the time. Every few steps comes a short request: first for one of these 8 (the
baseline), then for an adapter that was never seen, then the same when no slot is left. Given are the longest
step and the 99th percentile in seconds of the clock and of the processor's time of the thread that steps, and the
steps in which a running request got no token. Adapters are in memory: reading files is no part of it.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from threading import Timer
from typing import Any

from benchmarks.machine import machine
from benchmarks.serve import load, prepare, registry

WARM = 8
MID_STEP = 0.03  # seconds


def phase(engine: Any, cold: list[str], pool: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The steps of `steps` while one short request comes every few of them, for the next of `cold`."""
    from serve.engine.request import Request, SamplingParams

    def request(name: str, adapter: str, count: int) -> Request:
        chance = random.Random(name)
        params = SamplingParams(max_tokens=count, temperature=0)
        return Request(name, tuple(chance.choices(range(100, 200), k=2)), params, engine.pool.acquire(pool[adapter]))

    running = [request(f"run{number}", f"a{number % WARM}", options.steps + 30) for number in range(options.rows)]
    engine.submit(*running)
    while not all(each.output for each in running):
        engine.step()
    clock, processor, without = [], [], 0
    submitted: dict[str, float] = {}
    firsts: list[float] = []

    def submit(late: Request) -> None:
        submitted[late.id] = time.perf_counter()
        engine.submit(late)

    for number in range(options.steps):
        if number % options.every == 0:
            late = request(f"late{number}", cold[(number // options.every) % len(cold)], 2)
            Timer(MID_STEP, submit, (late,)).start()  # as requests come: while a step is computed
        before = [len(each.output) for each in running]
        start, own = time.perf_counter(), time.thread_time()
        outputs = engine.step()
        clock.append(time.perf_counter() - start)
        processor.append(time.thread_time() - own)
        without += any(len(each.output) == count for each, count in zip(running, before, strict=True))
        for output in outputs:
            if output.request_id in submitted:
                firsts.append(time.perf_counter() - submitted.pop(output.request_id))
    time.sleep(2 * MID_STEP)
    for each in running:
        engine.abort(each.id)
    while engine.has_work:
        engine.step()
    return {
        "longest_s": round(max(clock), 4),
        "p99_s": round(sorted(clock)[int(0.99 * len(clock))], 4),
        "median_s": round(sorted(clock)[len(clock) // 2], 4),
        "longest_processor_s": round(max(processor), 4),
        "median_processor_s": round(sorted(processor)[len(processor) // 2], 4),
        "steps_without_a_token": without,
        "median_first_token_s": round(sorted(firsts)[len(firsts) // 2], 4),
    }


def main() -> None:
    from serve.engine.build import build_engine
    from serve.engine.options import EngineOptions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--base")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.folder, options.only = Path(folder), None
        options.adapters = WARM + 2 * -(-options.steps // options.every)
        prepare(options)
        store = registry(options)
        pool = {f"a{number}": store.resolve(f"a{number}") for number in range(options.adapters)}
        slots = WARM + (options.adapters - WARM) // 2
        engine = build_engine(
            load(options),
            EngineOptions(max_rows=options.rows + 4, max_adapters=slots, max_length=256, adapter_bytes=4 << 30),
        )
        for version in pool.values():
            engine.pool.acquire(version)
        names = list(pool)
        phases = {
            "warm": phase(engine, names[:WARM], pool, options),
            "cold": phase(engine, names[WARM:slots], pool, options),
            "cold_and_full": phase(engine, names[slots:], pool, options),
        }
    ratio = round(phases["cold"]["longest_processor_s"] / phases["warm"]["longest_processor_s"], 2)
    workload = {key: getattr(options, key) for key in ("rows", "rank", "steps", "every", "threads", "dtype")}
    print(json.dumps({**machine(), "workload": {**workload, "slots": slots}, **phases, "ratio": ratio}))


if __name__ == "__main__":
    main()
