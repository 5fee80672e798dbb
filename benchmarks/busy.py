"""A shared machine: what other work on a core leaves of the speed of serving and training, ours and the peers'.

    python -m benchmarks.busy [--processes 1] [--tokens 48] [--rounds 3] [--examples 48] [--only serve|shared|train]

Each side is measured alone and beside `--processes` processes that never sleep, by turns on the same machine: our
engine and PEFT's `generate` with 16 requests of 8 adapters (benchmarks/serve.py), our trainer and transformers' over
PEFT (benchmarks/train.py). Medians; `kept` is the busy speed over the quiet one. `--only shared` runs one engine of
ours and then two at the same time: what they do together over what one does, and how unequal they are.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapterhub_local.settings import wait_briefly
from benchmarks import serve
from benchmarks.machine import child, machine

STATES = {"quiet": 0, "busy": 1}
WORK = "while True: pass"


@contextmanager
def others(count: int) -> Iterator[None]:
    """So many processes beside the caller that compute and never sleep."""
    processes = [subprocess.Popen([sys.executable, "-c", WORK]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def by_turns(options: argparse.Namespace, measure: Callable[[], float]) -> dict[str, float]:
    """Medians of `measure`, quiet and busy, of as many turns as there are rounds."""
    speeds: dict[str, list[float]] = {state: [] for state in STATES}
    for _ in range(options.rounds):
        for state, is_busy in STATES.items():
            with others(options.processes * is_busy):
                speeds[state].append(measure())
    medians = {state: round(statistics.median(each), 2) for state, each in speeds.items()}
    return {**medians, "kept": round(medians["busy"] / medians["quiet"], 3)}


def engine(options: argparse.Namespace) -> Callable[[], float]:
    """Our engine, which has answered once: tokens a second of another time."""
    wait_briefly()  # as `qhub serve` does
    base = serve.load(options)
    store = serve.registry(options)
    versions = [store.resolve(f"a{number}") for number in range(options.adapters)]
    engine = serve.engine_for(options, options.rows, base)
    texts = serve.prompts(options.rows, options.prompt, base.model.config.vocab_size)
    chosen = [versions[number % len(versions)] for number in range(options.rows)]

    def measure() -> float:
        return options.rows * options.tokens / serve.answer(engine, texts, chosen, options.tokens)[0]

    measure()  # warms up, fills the slots
    return measure


def ours(options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of our engine."""
    return by_turns(options, engine(options))


def beside(options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of our engine over some time, begun when all `servers` are ready."""
    measure = engine(options)
    (options.folder / f"ready-{options.servers}-{os.getpid()}").touch()
    while len(list(options.folder.glob(f"ready-{options.servers}-*"))) < options.servers:
        time.sleep(0.05)
    start, done = time.monotonic(), 0
    while time.monotonic() - start < options.seconds:
        measure()
        done += options.rows * options.tokens
    return {"speed": done / (time.monotonic() - start)}


def shared(side: Callable[..., dict[str, float]]) -> dict[str, Any]:
    """One engine, and two at once."""
    with ThreadPoolExecutor(2) as pool:
        alone = side("beside")["speed"]
        both = sorted(each["speed"] for each in pool.map(lambda _: side("beside", "--servers", "2"), range(2)))
    return {
        "one": round(alone, 1),
        "two": [round(each, 1) for each in both],
        "together": round(sum(both) / alone, 3),
        "slower over faster": round(both[0] / both[1], 3),
    }


def peft(options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of one batch of `generate` with `adapter_names`."""
    run = serve.peft_batch(options)
    run(2)
    return by_turns(options, lambda: options.rows * options.tokens / run(options.tokens)[0])


def training(options: argparse.Namespace) -> dict[str, Any]:
    """Examples a second of our trainer and of transformers', each run in a process of its own."""
    given = ("--examples", str(options.examples), "--tests", "0")

    def side(name: str) -> Callable[[], float]:
        return lambda: child("-m", "benchmarks.train", "--side", name, *given)["examples_per_second"]

    return {"ours": by_turns(options, side("ours")), "transformers Trainer": by_turns(options, side("baseline"))}


SIDES = {each.__name__: each for each in (serve.prepare, ours, beside, peft)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rows": 16, "adapters": 8, "rank": 16, "prompt": 64, "tokens": 48, "rounds": 3, "threads": 0}
    for name, default in {**sizes, "processes": 1, "examples": 48, "servers": 1, "seconds": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=("serve", "shared", "train"))
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--folder", type=Path)
    parser.set_defaults(dtype="float32", base=None, base_exec="auto", kernels="auto")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(SIDES[options.side](options)))
        return
    document: dict[str, Any] = {"benchmark": "busy", "machine": machine(), "busy_processes": options.processes}
    with tempfile.TemporaryDirectory() as folder:

        def side(name: str, *more: str) -> dict[str, Any]:
            return child("-m", "benchmarks.busy", *sys.argv[1:], "--side", name, "--folder", folder, *more)

        if options.only != "train":
            side("prepare")
        if options.only in (None, "serve"):
            document["serving, tokens/s"] = {"ours": side("ours"), "PEFT adapter_names": side("peft")}
        if options.only in (None, "shared"):
            document["two engines, tokens/s"] = shared(side)
        if options.only in (None, "train"):
            document["training, examples/s"] = training(options)
    print(json.dumps(document))


if __name__ == "__main__":
    from adapterhub_local.noise import hush

    hush()
    main()
