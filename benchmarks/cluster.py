"""What a gateway and Ray add to a request: the same streams from `qhub serve` and from `qhub cluster`, in one run.

    python -m benchmarks.cluster [--replicas 2] [--requests 100] [--tokens 64] [--clients 1,8] [--model DIR]

Both serve one base (a tiny random Llama unless --model names a folder of transformers, so the worst case for whoever
stands between) with 12 adapters from one home, one after the other in turn, and the turns alternate, so that other work
on the machine meets both. Given are milliseconds to the first token (median and 99th percentile) and between tokens
(median), tokens a second, what the gateway adds to both medians in each round, and the memory (PSS) of the processes:
of a replica, of a plain server, and of what Ray and the gateway need besides; and the gateway's processor time for a
request and a token. Greedy answers are compared byte by byte, but for ids and times. The last line is JSON. It needs
Ray.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
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
from serve.cluster.config import GATEWAYS, REPLICAS

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


def answers(url: str, tokens: int) -> list[str]:
    """A greedy stream of each adapter, without what is new in each answer."""
    found = []
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
        for number in range(ADAPTERS):
            body = {"model": f"a{number}", "prompt": "Hello there", "max_tokens": tokens, "temperature": 0}
            answer = client.post("/completions", json={**body, "stream": True, "logprobs": 1})
            answer.raise_for_status()
            found.append(re.sub(r'"(id|created)": ?("[^"]*"|\d+)', "", answer.text))
    return found


def added(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the cluster adds to the plain server's medians, for each round of each number of clients."""
    by_place = {(case["server"], case["clients"], case["round"]): case for case in cases}
    return [
        {
            "clients": clients,
            "round": number,
            "first_token_ms": round(case["first_token_p50_ms"] - plain["first_token_p50_ms"], 2),
            "token_ms": round(case["token_p50_ms"] - plain["token_p50_ms"], 2),
        }
        for (server, clients, number), case in by_place.items()
        if server == "cluster"
        for plain in [by_place["plain", clients, number]]
    ]


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


def memory_mb(pid: int) -> dict[str, list[float]]:
    """The proportional memory of a process and each of its descendants, in MB, by what they are."""
    from tests.processes import family

    found: dict[str, list[float]] = {}
    for process in (Path(f"/proc/{each}") for each in family(pid)):
        try:
            name = (process / "cmdline").read_bytes().split(b"\0")[0].decode().rpartition("/")[2][:40]
            pss = next(line for line in (process / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
        found.setdefault(name, []).append(round(int(pss.split()[1]) / 1000, 1))
    return found


def gateway_seconds(pid: int) -> float:
    """Processor time of the gateways below a process."""
    from tests.processes import family

    found = 0.0
    for process in (Path(f"/proc/{each}") for each in family(pid)):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().split(b"\0")[0].decode().endswith(f":{GATEWAYS}"):
                times = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
                found += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    return found


def gateway_us(head: int, url: str, requests: int, tokens: int) -> dict[str, float]:
    """Microseconds of the gateway's processor time for a request, and for each token of its answer."""
    each = []
    for length in (1, tokens):
        before = gateway_seconds(head)
        asyncio.run(streams(url, requests, 8, length))
        each.append(1e6 * (gateway_seconds(head) - before) / requests)
    return {"request": round(each[0]), "token": round((each[1] - each[0]) / (tokens - 1), 1)}


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
            are_equal = answers(urls["plain"], chosen.tokens) == answers(urls["cluster"], chosen.tokens)
            head = json.loads((home / "cluster/head.json").read_text())["pid"]
            gateway = gateway_us(head, urls["cluster"], chosen.requests, chosen.tokens)
            own = memory_mb(head)
            replicas = [size for name, sizes in own.items() if name.endswith(f":{REPLICAS}") for size in sizes]
            memory = {
                "plain": sum(map(sum, memory_mb(plain.pid).values())),
                "a_replica": round(statistics.mean(replicas), 1) if replicas else None,
                "fixed": round(sum(map(sum, own.values())) - sum(replicas), 1),
                "processes": own,
            }
        finally:
            os.killpg(plain.pid, signal.SIGKILL)
            plain.wait()
            subprocess.run([*qhub, "cluster", "down"], env=environment, stdout=subprocess.DEVNULL, check=True)
        told = {"machine": machine(), "up_seconds": started, "are_answers_equal": are_equal, "added": added(cases)}
        print(json.dumps({**told, "gateway_us": gateway, "memory_mb": memory, "cases": cases}))


if __name__ == "__main__":
    main()
