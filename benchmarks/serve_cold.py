"""How long a step gets while cold adapters come: the longest steps with and without them, in one run.

    python -m benchmarks.serve_cold [--rows 16] [--rank 16] [--steps 60] [--every 5] [--threads 1]

`rows` requests of 8 adapters run all the time. Every few steps comes a short request: first for one of these 8 (the
baseline), then for an adapter that is in memory and in no slot yet, then for one whose files are still to be read (they
were just written, so the disk is no part of it), then for all others in turn, twice as many adapters as slots, so that
each has lost its slot. Given are the longest step and the 99th percentile in seconds, of the clock and of the
processor's time of the thread that steps, the time from a request to its first token, and the steps in which a running
request got none.
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


def phase(engine: Any, late: list[str], pool: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The steps of `steps` while one short request comes every few of them, for the next of `late`."""
    from serve.engine.request import Request, SamplingParams
    from serve.threads import compute_alone

    def request(name: str, adapter: str, count: int) -> Request:
        chance = random.Random(name)
        params = SamplingParams(max_tokens=count, temperature=0)
        return Request(
            name, tuple(chance.choices(range(100, 200), k=2)), params, engine.pool.acquire(pool[adapter]).digest
        )

    running = [request(f"run{number}", f"a{number % WARM}", options.steps + 30) for number in range(options.rows)]
    engine.submit(*running)
    while not all(each.output for each in running):
        engine.step()
    clock, processor, without = [], [], 0
    submitted: dict[str, float] = {}
    firsts: list[float] = []

    def submit(name: str, adapter: str) -> None:
        """As the server does, in a thread beside the steps."""
        submitted[name] = time.perf_counter()
        compute_alone()
        engine.submit(request(name, adapter, 2))

    for number in range(options.steps):
        if number % options.every == 0:
            adapter = late[(number // options.every) % len(late)]
            Timer(MID_STEP, submit, (f"late{number}", adapter)).start()  # as requests come: while a step is computed
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
        count = -(-options.steps // options.every)
        slots = WARM + count
        options.adapters = 2 * slots
        prepare(options)
        store = registry(options)
        pool = {f"a{number}": store.resolve(f"a{number}") for number in range(options.adapters)}
        engine = build_engine(
            load(options),
            EngineOptions(max_rows=options.rows + 4, max_adapters=slots, max_length=256, adapter_bytes=4 << 30),
        )
        names = list(pool)
        for name in names[:slots]:
            engine.pool.acquire(pool[name])
        phases = {
            "warm": phase(engine, names[:WARM], pool, options),
            "cold": phase(engine, names[WARM:slots], pool, options),
            "read": phase(engine, names[slots : slots + count], pool, options),
            "twice_as_many": phase(engine, names[WARM:], pool, options),
        }
    ratio = round(phases["cold"]["longest_processor_s"] / phases["warm"]["longest_processor_s"], 2)
    workload = {key: getattr(options, key) for key in ("rows", "rank", "steps", "every", "threads", "dtype")}
    workload |= {"slots": slots, "adapters": 2 * slots}
    print(json.dumps({**machine(), "workload": workload, **phases, "ratio": ratio}))


if __name__ == "__main__":
    main()
