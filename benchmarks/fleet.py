"""A fleet that is larger than any machine here: what breaks first, and at which size. No GPU, no Ray.

    python -m benchmarks.fleet                          # 10 to 100 replicas, 100 to 10,000 adapters, Zipf 0.8 to 1.2
    python -m benchmarks.fleet --large                  # 1,000 replicas and 10,000 adapters as well, an hour
    python -m benchmarks.fleet --cases 100x1000x1.0x0.7 # replicas x adapters x Zipf x load, and options below

Simulated is time alone: placement, limits, scheduler, pages, the pool of adapters and their slots are the product's own
code (`fleet_traffic`, `fleet_replica`). How long a step takes is a model of four numbers, which fit what an H100 was
measured to do within 6 % (Qwen3-4B's shape, rank 32: 1 to 64 rows, 1 to 64 adapters; see RESULTS.md); the time of a
prompt's token, of a remote and of the way through a gateway are assumed, and options. Waiting at the gateway is Ray's:
rounds with a pause between them. The gateway is taken to know how busy each replica is; requests share no beginnings.
What the gateway itself costs is measured, with its own code (`fleet_measured`). The last line is JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import product
from typing import Any

from benchmarks.fleet_measured import measured
from benchmarks.fleet_model import Costs, Shape
from benchmarks.fleet_traffic import Fleet, Traffic
from benchmarks.machine import machine, peak_memory_mb

SMALL = [
    *product((10, 100), (100, 1000, 10_000), (0.8, 1.0, 1.2), (0.7,)),
    *product((10, 100), (1000,), (1.0,), (0.5, 0.9)),
]
LARGE = [(1000, 10_000, 0.8, 0.7), (1000, 10_000, 1.0, 0.7), (1000, 10_000, 1.2, 0.7), (1000, 10_000, 1.0, 0.9)]
SIZES = (10, 100, 1000)


def simulated(traffic: Traffic, shape: Shape, costs: Costs) -> dict[str, Any]:
    """One case: what it was, what was seen, and how long that took."""
    begun = time.process_time()
    seen = Fleet(traffic, shape, costs).run()
    return {**{name: getattr(traffic, name) for name in ("replicas", "adapters", "zipf", "load", "others")}, **seen,
            "cpu_seconds": round(time.process_time() - begun, 1)}  # fmt: skip


def row(found: dict[str, Any], price: float) -> str:
    """A case as a row of the table."""
    cost = found["gpu_seconds_per_1000_tokens"]
    places, first = found["places"], found["first_token_ms"]
    values = (
        found["replicas"], found["adapters"], found["zipf"], found["load"], f"{found['requests_per_second']:,.0f}",
        f"{100 * found['warm']:.1f}", f"{100 * places['first']:.1f}", f"{100 * places['close']:.1f}",
        f"{100 * places['drawn']:.1f}", found["probes"], found["reads_per_second"], first["p50"], first["p99"],
        found["rows"], f"{cost:.3f}", f"{1000 * cost * price / 3600:.3f}", sum(found["refused"].values()),
    )  # fmt: skip
    return f"| {' | '.join(map(str, values))} |"


HEAD = (
    "| replicas | adapters | Zipf | load | requests/s | warm % | at the first % | close % | drawn % | probes | "
    "loads/s | first token p50 ms | p99 | rows | GPU s per 1,000 tokens | $ per million | refused |"
)


def options(parser: argparse.ArgumentParser, table: Any) -> None:
    """An option for each number of a dataclass, with its default."""
    for item in fields(table):
        if isinstance(item.default, int | float):
            flag = f"--{item.name.replace('_', '-')}"
            parser.add_argument(flag, type=type(item.default), default=item.default)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--cases", help="such as 10x100x1.0x0.7, several separated by commas")
    parser.add_argument("--others", choices=("few", "all"), default="few")
    parser.add_argument("--requests-per-minute", type=int, help="of each key")
    parser.add_argument("--price", type=float, default=2.5, help="dollars an hour of one GPU")
    parser.add_argument("--no-measuring", action="store_true")
    for name in ("prompt", "answer", "keys", "waiting", "gateways", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Traffic, name))
    for name in ("warm", "seconds"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Traffic, name))
    options(parser, Shape)
    options(parser, Costs)
    given = vars(parser.parse_args(arguments))
    cases = LARGE if given["large"] else []
    cases = [*SMALL, *cases]
    if given["cases"]:
        cases = [tuple(map(float, case.split("x"))) for case in given["cases"].split(",")]  # type: ignore[misc]
    shape, costs = (table(**{item.name: given[item.name] for item in fields(table)}) for table in (Shape, Costs))
    common = Traffic(rate=given["requests_per_minute"], others=given["others"], **{
        name: given[name] for name in ("prompt", "answer", "keys", "waiting", "gateways", "seed", "warm", "seconds")
    })  # fmt: skip
    print(HEAD, "|" + " --- |" * HEAD.count(" | ") + " --- |", sep="\n")
    seen = []
    for replicas, adapters, zipf, load in cases:
        traffic = replace(common, replicas=int(replicas), adapters=int(adapters), zipf=float(zipf), load=float(load))
        seen.append(simulated(traffic, shape, costs))
        print(row(seen[-1], given["price"]), flush=True)
        print(json.dumps(seen[-1]), file=sys.stderr, flush=True)
    real = {} if given["no_measuring"] else measured(SIZES, 10_000)
    told = {"machine": machine(), "shape": asdict(shape), "costs": asdict(costs), "traffic": asdict(common)}
    print(json.dumps({**told, "cases": seen, "measured": real, "peak_memory_mb": peak_memory_mb()}))


if __name__ == "__main__":
    main()
