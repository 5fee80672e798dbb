"""examples/haproxy.cfg before three real servers: one of them is killed, and nobody who had no answer yet notices."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.registry import Registry
from tests.patience import PATIENCE
from tests.serve.adapter_makers import publish

EXAMPLE = Path(__file__).parents[3] / "examples/haproxy.cfg"
ADAPTERS = [f"h{number}" for number in range(6)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed: apt-get install haproxy"),
]


@pytest.fixture
def balanced(tiny_base: BaseInfo, registry: Registry, tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """The address of the balancer, and the three servers behind it."""
    for seed, name in enumerate(ADAPTERS):
        publish(registry, name, tiny_base, seed=seed, rank=4, alias="prod")
    ports = free_ports(4)
    text = EXAMPLE.read_text()
    for number, port in enumerate(ports):
        text = text.replace(f"127.0.0.1:800{number}", f"127.0.0.1:{port}")
    config = tmp_path / "haproxy.cfg"
    config.write_text(text)
    servers = [
        subprocess.Popen(
            [sys.executable, "-m", "serve", "--port", str(port), "--replica", f"r{number}", "--no-access-log"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for number, port in enumerate(ports[1:], 1)
    ]
    proxy = None
    try:
        for server in servers:
            assert "Serving tiny" in server.stdout.readline()
        proxy = subprocess.Popen(["haproxy", "-f", str(config)], stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{ports[0]}"
        wait_for(url)
        yield url, servers
    finally:
        for process in [*servers, *([proxy] if proxy else [])]:
            process.kill()
            process.wait()
        for server in servers:
            server.stdout.close()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(url: str) -> None:
    """Until the balancer has looked at its servers."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


async def ask(url: str, num: int, kill: subprocess.Popen | None = None, at_once: int = 12) -> list[dict]:
    """`num` streams, so many at once, over all adapters; after a quarter of them a server is killed."""
    found: list[dict] = []
    turns = asyncio.Semaphore(at_once)

    async def stream(client: httpx.AsyncClient, number: int) -> None:
        model = ADAPTERS[number % len(ADAPTERS)] + ("@prod" if number % 2 else "")
        body = {"model": model, "prompt": "Hello", "max_tokens": 20, "ignore_eos": True, "stream": True}
        result = {"model": model.partition("@")[0], "status": None, "ended": False}
        async with turns:
            try:
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    result |= {"status": answer.status_code, "replica": answer.headers.get("x-qhub-replica")}
                    async for line in answer.aiter_lines():
                        result["ended"] = result["ended"] or line == "data: [DONE]"
            except httpx.RemoteProtocolError:
                pass  # cut off
        found.append(result)

    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as client:
        work = [asyncio.create_task(stream(client, number)) for number in range(num)]
        while kill is not None and len(found) < num // 4:
            await asyncio.sleep(0.01)
        if kill is not None:
            os.kill(kill.pid, signal.SIGKILL)
        await asyncio.gather(*work)
    return found


def test_a_server_is_killed(balanced: tuple[str, list[subprocess.Popen]]) -> None:
    """Adapters keep their servers; at a kill no status is 500 or more, and only what had begun there is cut."""
    url, servers = balanced
    calm = asyncio.run(ask(url, 24, at_once=1))  # with more at once hot servers spill
    assert Counter(each["status"] for each in calm) == {200: 24}
    assert all(each["ended"] for each in calm)
    homes = Counter(each["replica"] for each in calm)
    assert len({(each["model"], each["replica"]) for each in calm}) <= 7  # 6 adapters
    victim = int(homes.most_common(1)[0][0].removeprefix("r"))

    found = asyncio.run(ask(url, 60, servers[victim - 1]))
    assert Counter(each["status"] for each in found) == {200: 60}
    cut = [each for each in found if not each["ended"]]
    assert {each["replica"] for each in cut} <= {f"r{victim}"}
    assert len(cut) <= 12
    assert {each["replica"] for each in found[-20:]} <= {f"r{number}" for number in (1, 2, 3) if number != victim}
