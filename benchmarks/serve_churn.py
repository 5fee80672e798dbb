"""Whether a server's memory stays flat while adapters come and go: loads, evictions, new versions, moved aliases.

    python -m benchmarks.serve_churn --seconds 3600

A real server with few slots and little memory for adapters, and many more adapters than fit, asked for by popularity
(Zipf), while versions are published, aliases moved, old versions removed and collected. On a tiny base with random
weights, or on `--base NAME` of this home's bases. The last line printed is one JSON document.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
MAX_ROWS, MAX_ADAPTERS, PREFIX_BYTES = 8, 4, 1 << 20
RANKS = (2, 4, 8, 16)
FIT = 16  # adapters of the largest rank that the memory for adapters holds
KEEP_VERSIONS = 2
SECONDS_BETWEEN_SAMPLES = 5.0


class Churn:
    """What is asked and published, and what came of it."""

    def __init__(self, url: str, registry: Any, base: Any, names: Sequence[str], rate: float, seed: int) -> None:
        self.url = url
        self.registry = registry
        self.base = base
        self.names = names
        self.rate = rate
        self.rng = random.Random(seed)
        self.weights = [1 / place for place in range(1, len(names) + 1)]
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    async def run(self, seconds: float, publish_every: float, sample: Any) -> None:
        """Ask for so long, at `rate` requests a second, while adapters change and `sample()` is called."""
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=MAX_ROWS)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, trust_env=False, limits=limits) as http:
            await asyncio.gather(self._requests(http, end), self._change(end, publish_every), self._sample(end, sample))

    async def _requests(self, http: httpx.AsyncClient, end: float) -> None:
        """One after another at the rate, none waiting for another's answer."""
        running: set[asyncio.Task] = set()
        due = time.monotonic()
        while (clock := time.monotonic()) < end:
            if len(running) < 4 * MAX_ROWS:
                task = asyncio.create_task(self._ask(http))
                running.add(task)
                task.add_done_callback(running.discard)
            due = max(due + self.rng.expovariate(self.rate), clock - 1.0)
            await asyncio.sleep(max(0.0, due - clock))
        await asyncio.gather(*running)

    def _model(self) -> str:
        """A name as its popularity says, in one of the spellings that always mean something."""
        name, other = self.rng.choices(self.names, self.weights, k=2)
        spellings = (name, name, f"{name}@prod", f"{self.base.name}:{name}", f"{name}*0.7+{other}@prod*0.3")
        return self.rng.choice(spellings)

    async def _ask(self, http: httpx.AsyncClient) -> None:
        prompt = "".join(self.rng.choices("abcdefghij ", k=self.rng.randint(4, 120)))
        body: dict[str, Any] = {"model": self._model(), "max_tokens": self.rng.randint(1, 12), "ignore_eos": True}
        body |= self.rng.choice(({}, {"temperature": 0}, {"stream": True}, {"logprobs": 2, "stream": True}, {"n": 2}))
        try:
            while True:
                response = await http.post("/v1/completions", json={**body, "prompt": prompt})
                self.counts[str(response.status_code)] += 1
                if response.status_code != 429:  # the server says that it is full, and when to ask again
                    break
                await asyncio.sleep(0.2)
        except httpx.HTTPError as error:
            self.problems.append(f"{body['model']}: {type(error).__name__} {error}")
            return
        if response.status_code != 200 or '"error"' in response.text:
            self.problems.append(f"{body['model']}: {response.status_code} {response.text[:200]}")

    async def _change(self, end: float, publish_every: float) -> None:
        number = 0
        while time.monotonic() < end:
            number += 1
            await asyncio.to_thread(self._change_one, number)
            await asyncio.sleep(publish_every)

    def _change_one(self, number: int) -> None:
        """A new version of some adapter, its alias moved or left behind, what is too old removed and collected."""
        from adapterhub_local.registry.gc import collect, remove
        from tests.serve.adapter_makers import publish

        name = self.rng.choices(self.names, self.weights)[0]
        version = publish(self.registry, name, self.base, seed=1000 + number, rank=self.rng.choice(RANKS))
        if self.rng.random() < 0.5:
            self.registry.set_alias(name, "prod", version.number)
        pointed = set(self.registry.aliases(name).values())
        old = [one for one in self.registry.versions(name) if one.number not in pointed][:-KEEP_VERSIONS]
        for one in old:
            remove(self.registry, one)
        self.counts["published"] += 1
        self.counts["removed"] += len(old)
        if number % 50 == 0:  # a minute is far longer than from a name to its bytes
            self.counts["collected"] += collect(self.registry, apply=True, grace=60, purge=60).num_blobs

    async def _sample(self, end: float, sample: Any) -> None:
        while time.monotonic() < end:
            sample()
            await asyncio.sleep(min(SECONDS_BETWEEN_SAMPLES, max(0.0, end - time.monotonic())))


def slope(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Growth an hour of (seconds, value), and its standard error, by least squares. Needs three samples.

    Neighbouring samples are alike, so the true uncertainty is larger than that error.
    """
    times, values = zip(*samples, strict=True)
    fitted, _ = statistics.linear_regression(times, values)
    middle, level = statistics.fmean(times), statistics.fmean(values)
    left = sum((value - level - fitted * (at - middle)) ** 2 for at, value in samples)
    spread = sum((at - middle) ** 2 for at in times)
    return fitted * 3600, (left / (len(samples) - 2) / spread) ** 0.5 * 3600


def process_state(pid: int) -> dict[str, float]:
    """Resident memory in MB, threads, open files and seconds of processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    return {
        "mb": int(fields[21]) * page / 1e6,
        "threads": int(fields[17]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "cpu": (int(fields[11]) + int(fields[12])) / ticks,
    }


def prepare(home: Path, base_folder: Path | None, num_adapters: int) -> tuple[Any, Any, list[str], int]:
    """A home with a base and its adapters: the registry, the base, the names, and bytes of the largest adapter."""
    from adapterhub_local.base.add import add_base
    from adapterhub_local.base.bases import read_record
    from adapterhub_local.registry import Registry
    from adapterhub_local.settings import home as home_at
    from tests.serve.adapter_makers import publish
    from tests.tiny import save_tiny_model

    if base_folder is None:
        base = add_base("tiny", save_tiny_model(home / "model"), home_at(home))
    else:
        target = home_at(home).bases / base_folder.name
        shutil.copytree(base_folder, target)
        base = read_record(target)
    registry = Registry(home)
    names = [f"adapter-{number:04d}" for number in range(num_adapters)]
    for number, name in enumerate(names):
        publish(registry, name, base, seed=number, rank=RANKS[number % len(RANKS)], alias="prod")
    largest = registry.resolve(names[RANKS.index(max(RANKS))])
    return registry, base, names, sum(file.size for file in largest.files)


def serve(base: str, adapter_bytes: int) -> None:
    """The server's process: what `qhub serve` runs, with the limits of this benchmark."""
    from serve.engine.options import EngineOptions
    from serve.options import HttpOptions
    from serve.server import run_server

    options = EngineOptions(
        max_rows=MAX_ROWS,
        max_adapters=MAX_ADAPTERS,
        max_length=512,
        adapter_bytes=adapter_bytes,
        prefix_bytes=PREFIX_BYTES,
    )
    announce = lambda line: print(line, flush=True)  # noqa: E731
    run_server([base], "127.0.0.1", 0, options=options, http=HttpOptions(), announce=announce, access_log=False)


def measure(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    """The whole run: registry, server, churn, and what was seen."""
    from adapterhub_local.base.bases import find_base

    folder = find_base(arguments.base).folder if arguments.base else None
    registry, base, names, largest = prepare(home, folder, arguments.adapters)
    command = [sys.executable, "-m", "benchmarks.serve_churn", "--serve", base.name, str(FIT * largest)]
    environment = {**os.environ, "QHUB_HOME": str(home), "QHUB_DEVICE": "cpu"}
    samples: list[tuple[float, dict[str, float]]] = []
    with open(home / "serve.log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout
            line = process.stdout.readline()
            if not line:
                sys.exit(f"the server did not start: {(home / 'serve.log').read_text()[-2000:]}")
            churn = Churn(line.split()[-1].removesuffix("/v1"), registry, base, names, arguments.rate, arguments.seed)
            start = time.monotonic()

            def sample() -> None:
                samples.append((time.monotonic() - start, process_state(process.pid)))
                if len(samples) % 60 == 1:
                    at, state = samples[-1]
                    print(f"{at:6.0f} s  {state['mb']:.1f} MB  {dict(churn.counts)}", file=sys.stderr)

            asyncio.run(churn.run(arguments.seconds, arguments.publish_every, sample))
            health = httpx.get(f"{churn.url}/health", trust_env=False, timeout=30).json()["engine"]
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()
    second_half = [(at, state["mb"]) for at, state in samples if at >= arguments.seconds / 2]
    growth, error = slope(second_half)
    states = [state for _, state in samples]
    return {
        "benchmark": "serve_churn",
        "workload": {
            "seconds": arguments.seconds,
            "base": base.name,
            "adapters": len(names),
            "adapters_that_fit": FIT,
            "largest_adapter_bytes": largest,
            "slots": MAX_ADAPTERS,
            "ranks": RANKS,
            "popularity": "Zipf, exponent 1",
            "requests_per_second": arguments.rate,
            "seconds_between_versions": arguments.publish_every,
        },
        "growth_mb_per_hour": round(growth, 2),
        "growth_standard_error": round(error, 2),
        "memory_mb": {
            "first": round(states[0]["mb"], 1),
            "at_half": round(second_half[0][1], 1),
            "last": round(states[-1]["mb"], 1),
            "largest": round(max(state["mb"] for state in states), 1),
        },
        "curve_mb": [round(state["mb"], 1) for state in states[:: max(1, len(states) // 24)]],
        "threads": {"first": states[0]["threads"], "last": states[-1]["threads"]},
        "open_files": {"first": states[0]["files"], "last": states[-1]["files"]},
        "server_cores": round((states[-1]["cpu"] - states[0]["cpu"]) / (samples[-1][0] - samples[0][0]), 3),
        "counts": dict(churn.counts),
        "failed_requests": len(churn.problems),
        "problems": churn.problems[:10],
        **{name: health[name] for name in ("adapter_loads", "adapter_evictions", "num_steps", "adapter_bytes")},
        "loaded_mb_in_total": round(health["adapter_loads"] * largest * statistics.fmean(RANKS) / max(RANKS) / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A server's memory while adapters come and go.")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--publish-every", type=float, default=1.0, help="seconds between new versions")
    parser.add_argument("--adapters", type=int, default=200, help="how many are registered")
    parser.add_argument("--base", help="a base of this home instead of a tiny one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", nargs=2, metavar=("BASE", "BYTES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], int(arguments.serve[1]))
        return
    from benchmarks.machine import machine

    os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    print(json.dumps({**result, "machine": machine()}))


if __name__ == "__main__":
    main()
