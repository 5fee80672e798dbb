"""Short prompts under long ones: time to their first token beside alone, with steps in order of arrival and shared.

    python -m benchmarks.fair_share [--long 3] [--size 2000] [--short 20] [--rounds 3] [--threads 2]

"before" is the policy there was: each prompt takes from a step what it can, in order of arrival. Both run on one
engine, in turns. A short prompt comes in the middle of the first step of the long ones. `gap_s` is the longest that an
answer waited for its next token while the long prompts were read; `tokens_per_second` counts all tokens, of prompts and
answers, of long and short requests that come together. The target is a first token within twice the time alone and
one step, at 95 % of the throughput.
"""

import argparse
import functools
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any

from benchmarks.machine import machine
from benchmarks.serve import load


def in_order(scheduler: Any, prompts: list[Any], budget: int, *, is_awaited: bool) -> list[Any]:
    """How a step was divided before: to each prompt all it can take, the first to come first."""
    from serve.engine.request import Scheduled

    batch = []
    for request in prompts:
        count = min(request.num_tokens - request.num_computed, budget)
        if count:
            batch.append(Scheduled(request, request.num_computed, count))
            budget -= count
    return batch


class Bench:
    """One engine under both policies."""

    def __init__(self, engine: Any, options: argparse.Namespace) -> None:
        self.engine = engine
        self.options = options
        self.numbers: Iterator[int] = iter(range(1 << 30))

    @contextmanager
    def policy(self, name: str) -> Iterator[None]:
        if name == "before":
            self.engine.scheduler._divide = functools.partial(in_order, self.engine.scheduler)
        try:
            yield
        finally:
            self.engine.scheduler.__dict__.pop("_divide", None)

    def request(self, size: int, count: int) -> Any:
        from serve.engine.request import Request, SamplingParams

        number = next(self.numbers)
        tokens = random.Random(number).choices(range(1000, 40000), k=size)
        return Request(str(number), tuple(tokens), SamplingParams(count, temperature=0))

    def drain(self, watch: Callable[[str, float], None] = lambda *_: None) -> list[float]:
        """Step until all is answered; the seconds of each step. `watch` gets every token and its time."""
        steps = []
        while self.engine.has_work:
            start = time.perf_counter()
            outputs = self.engine.step()
            now = time.perf_counter()
            steps.append(now - start)
            for output in outputs:
                watch(output.request_id, now)
        return steps

    def alone(self) -> float:
        """Seconds to the first token of a short prompt that has the engine for itself."""
        start, firsts = time.perf_counter(), []
        self.engine.submit(self.request(self.options.short, 1))
        self.drain(lambda _, now: firsts.append(now - start))
        return firsts[0]

    def behind(self) -> tuple[float, float, float]:
        """The same of one that comes while long ones are read; the median of their steps; an answer's longest gap."""
        answered = self.request(self.options.short, 400)
        self.engine.submit(answered)
        self.engine.step()
        short, came, times = self.request(self.options.short, 1), [], {}

        def submit() -> None:
            came.append(time.perf_counter())
            self.engine.submit(short)

        self.engine.submit(*(self.request(self.options.size, 1) for _ in range(self.options.long)))
        tokens: list[float] = []
        timer = Timer(self.options.after, submit)
        timer.start()
        steps = []
        while len(times) < self.options.long + 1:  # the short one, and all long ones
            start = time.perf_counter()
            outputs = self.engine.step()
            now = time.perf_counter()
            steps.append(now - start)
            for output in outputs:
                if output.request_id == answered.id:
                    tokens.append(now)
                else:
                    times[output.request_id] = now
        self.engine.abort(answered.id)
        self.drain()
        gaps = [late - early for early, late in itertools.pairwise(tokens)]
        return times[short.id] - came[0], statistics.median(steps), max(gaps)

    def throughput(self) -> float:
        """Tokens a second, prompts included, of long and short requests that come at once."""
        sizes = [self.options.size] * self.options.long + [self.options.short] * 8
        requests = [self.request(size, self.options.answer) for size in sizes]
        start = time.perf_counter()
        self.engine.submit(*requests)
        self.drain()
        return sum(each.num_tokens for each in requests) / (time.perf_counter() - start)


def main() -> None:
    from serve.engine.build import build_engine
    from serve.engine.options import EngineOptions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"long": 3, "size": 2000, "short": 20, "answer": 32, "rounds": 3, "threads": 2}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--after", type=float, default=0.3, help="seconds after the long prompts comes the short one")
    parser.add_argument("--prefill-tokens", type=int, help="as of the server")
    parser.add_argument("--base")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    limits = EngineOptions(prefix_bytes=0, max_length=4096, prefill_tokens=options.prefill_tokens)
    bench = Bench(build_engine(load(options), limits), options)
    bench.alone()
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for name in ("before", "after"):
            with bench.policy(name):
                lists = found.setdefault(name, {"alone_s": [], "first_s": [], "step_s": [], "gap_s": [], "rate": []})
                first, step, gap = bench.behind()
                values = (bench.alone(), first, step, gap, bench.throughput())
                for kind, value in zip(lists.values(), values, strict=True):
                    kind.append(value)
    medians = {
        name: {kind: round(statistics.median(values), 3) for kind, values in lists.items()}
        for name, lists in found.items()
    }
    for figures in medians.values():
        figures["times_alone"] = round(figures["first_s"] / figures["alone_s"], 1)
        figures["tokens_per_second"] = round(figures.pop("rate"), 1)
    after = medians["after"]
    allowed = round(2 * after["alone_s"] + after["step_s"], 3)
    ratio = round(after["tokens_per_second"] / medians["before"]["tokens_per_second"], 3)
    workload = {name: getattr(options, name) for name in (*defaults, "after", "dtype")}
    print(json.dumps({**machine(), "workload": workload, **medians, "allowed_s": allowed, "throughput_ratio": ratio}))


if __name__ == "__main__":
    main()
