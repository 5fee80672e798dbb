"""What a gateway and Ray add to a request: the same streams from `qhub serve` and from `qhub cluster`, in one run.

    python -m benchmarks.cluster [--replicas 2] [--requests 100] [--tokens 64] [--clients 1,8] [--model DIR]

Both serve one base (a tiny random Llama unless --model names a folder of transformers, so the worst case for whoever
stands between) with 12 adapters from one home, one after the other in turn, and the turns alternate, so that other work
on the machine meets both. Given are seconds to the first token and between tokens (medians and 99th percentiles),
tokens a second, and the greatest memory (PSS) of the processes. The last line is JSON. It needs Ray.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import machine

ADAPTERS = 12


def prepare(home: Path, model: Path | None) -> None:
    """A home with a base and its adapters."""
    from adapterhub_local.base.add import add_base
    from adapterhub_local.registry import Registry
    from adapterhub_local.settings import home as home_at
    from tests.serve.adapter_makers import publish
    from tests.tiny import save_tiny_model

    place = home_at(home)
    with tempfile.TemporaryDirectory() as folder:
        base = add_base("bench", model or save_tiny_model(Path(folder) / "model"), place)
    for seed in range(ADAPTERS):
        publish(Registry(place), f"a{seed}", base, seed=seed, rank=8)


async def streams(url: str, requests: int, clients: int, tokens: int) -> dict[str, Any]:
    """`requests` streams, so many at once."""
    firsts: list[float] = []
    gaps: list[float] = []
    turns = asyncio.Semaphore(clients)

    async def stream(client: httpx.AsyncClient, number: int) -> None:
        body = {"model": f"a{number % ADAPTERS}", "prompt": "Hello there", "max_tokens": tokens, "ignore_eos": True}
        async with turns:
            times = [time.perf_counter()]
            async with client.stream("POST", "/completions", json={**body, "stream": True, "logprobs": 0}) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        times.append(time.perf_counter())
        firsts.append(times[1] - times[0])
        gaps.append((times[-1] - times[1]) / max(1, len(times) - 2))

    begun = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
        await asyncio.gather(*(stream(client, number) for number in range(requests)))
    seconds = time.perf_counter() - begun
    return {
        "first_token_p50_ms": _ms(statistics.median(firsts)),
        "first_token_p99_ms": _ms(sorted(firsts)[int(0.99 * len(firsts))]),
        "token_p50_ms": _ms(statistics.median(gaps)),
        "tokens_per_second": round(requests * tokens / seconds, 1),
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


def memory_mb(group: int) -> dict[str, float]:
    """The proportional memory of the processes of a group, in MB, by what they are."""
    found: dict[str, float] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) != group:
                continue
            name = (process / "cmdline").read_bytes().split(b"\0")[0].decode().rpartition("/")[2][:40]
            pss = next(line for line in (process / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
        found[name] = round(found.get(name, 0) + int(pss.split()[1]) / 1000, 1)
    return found


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", default="1,8")
    parser.add_argument("--model", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        prepare(home, chosen.model)
        environment = {**os.environ, "QHUB_HOME": str(home)}
        config = Path(folder) / "cluster.toml"
        config.write_text(f'base = "bench"\n[replicas]\nmin = {chosen.replicas}\ncpus = 0.1\n[gateway]\nport = 0\n')
        qhub = [sys.executable, "-m", "adapterhub_local"]
        command = [*qhub, "serve", "--port", "0", "--no-access-log"]
        plain = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            begun = time.perf_counter()
            up = subprocess.run(
                [*qhub, "cluster", "up", str(config), "--json"],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            started = round(time.perf_counter() - begun, 1)
            assert plain.stdout is not None
            urls = {"plain": plain.stdout.readline().split()[-1], "cluster": json.loads(up.stdout)["urls"][0]}
            cases = []
            for clients in map(int, chosen.clients.split(",")):
                for number in range(chosen.rounds + 1):
                    for name, url in urls.items():
                        requests = chosen.requests if number else ADAPTERS  # the first round warms up
                        case = asyncio.run(streams(url, requests, clients, chosen.tokens))
                        if number:
                            cases.append({"server": name, "clients": clients, "round": number, **case})
                            print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
            head = json.loads((home / "cluster/head.json").read_text())["pid"]
            memory = {"plain": memory_mb(plain.pid), "cluster": memory_mb(head)}
        finally:
            os.killpg(plain.pid, signal.SIGKILL)
            plain.wait()
            subprocess.run([*qhub, "cluster", "down"], env=environment, stdout=subprocess.DEVNULL, check=True)
        print(json.dumps({"machine": machine(), "up_seconds": started, "memory_mb": memory, "cases": cases}))


if __name__ == "__main__":
    main()
