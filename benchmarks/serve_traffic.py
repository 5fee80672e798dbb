"""Mixed good and bad traffic against a real `qhub serve`: every good request answered, no 500, nothing leaked.

    python -m benchmarks.serve_traffic --seconds 600

On a tiny NF4 base with random weights: what is tested is the server, not the model. Beside the traffic here,
schemathesis makes requests from the server's OpenAPI document (pip install -e '.[dev]'). At the end the server is
killed without warning and started again. The last line printed is one JSON document.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
STABLE = ("alpha", "beta", "gamma", "alpha@prod", "tiny")  # what good requests ask; the rest comes and goes
PROMPTS = ("Hello", "Once upon a time", "a" * 200)
JSON_FORM = {
    "type": "json_schema",
    "json_schema": {"name": "n", "schema": {"type": "integer", "minimum": 0, "maximum": 99}},
}
BAD_SCHEMA = json.dumps(
    {
        "model": "alpha",
        "prompt": "x",
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}},
    }
).encode()
BAD_BODIES: tuple[tuple[str, bytes], ...] = (
    ("/v1/completions", b""),
    ("/v1/completions", b"{"),
    ("/v1/completions", b'{"model": NaN}'),
    ("/v1/completions", b"[" * 50_000),
    ("/v1/completions", b"\xff\xfe\x00"),
    ("/v1/chat/completions", b'{"model": "alpha", "messages": [{"role": "user", "content": "\\ud800"}]}'),
    ("/v1/completions", b'{"model": "alpha", "prompt": "\\ud800"}'),
    ("/v1/completions", b'{"model": "alpha", "prompt": "x", "\\ud800": 1}'),
    ("/v1/completions", b'{"model": "\\ud800", "prompt": "x"}'),
    ("/v1/completions", b'{"model": "alpha", "prompt": "x", "max_tokens": 10000}'),
    ("/v1/completions", b'{"model": "alpha", "prompt": "x", "n": 128, "max_tokens": 1}'),
    ("/v1/completions", b'{"model": "../../etc/passwd", "prompt": "x"}'),
    ("/v1/completions", b'{"model": "nothing@sha256:000000000000", "prompt": "x"}'),
    ("/v1/completions", b'{"model": "alpha", "prompt": [99999999]}'),
    ("/v1/completions", b'{"model": "alpha", "prompt": "x", "logit_bias": {"1": 1e400}}'),
    ("/v1/completions", b'{"model": "alpha*nan", "prompt": "x"}'),
    ("/v1/chat/completions", b'{"model": "alpha", "messages": [], "tools": 5}'),
    ("/v1/completions", b'{"model": "beta", "prompt": "x", "response_format": {"type": "json_schema"}}'),
    ("/v1/completions", BAD_SCHEMA),
    ("/v1/load_lora_adapter", b'{"lora_name": "x", "lora_path": "/etc"}'),
    ("/v1/unload_lora_adapter", b'{"lora_name": "nothing"}'),
)  # fmt: skip


class Traffic:
    """What is sent, and what came of it."""

    def __init__(self, url: str, registry: Any, base: Any, seed: int) -> None:
        self.url = url
        self.registry = registry
        self.base = base
        self.rng = random.Random(seed)
        self.answers: dict[tuple[str, str], str] = {}
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    async def run(self, seconds: float, clients: int = 8) -> None:
        """Send for so long, from so many clients at once, while adapters are published and removed."""
        end = time.monotonic() + seconds
        async with httpx.AsyncClient(base_url=self.url, timeout=120, trust_env=False) as http:
            await asyncio.gather(self._churn(end), *(self._client(http, end) for _ in range(clients)))

    async def _client(self, http: httpx.AsyncClient, end: float) -> None:
        kinds = (self._good, self._good, self._stream, self._bad, self._huge, self._leave, self._passing, self._slow)
        while time.monotonic() < end:
            kind = self.rng.choice(kinds)
            self.counts[kind.__name__.strip("_")] += 1
            try:
                await kind(http)
            except (httpx.HTTPError, OSError) as error:
                self.problems.append(f"{kind.__name__}: {type(error).__name__} {error}")

    async def _good(self, http: httpx.AsyncClient) -> None:
        """Greedy answers: the same question has the same answer, whatever happens around it."""
        model, prompt = self.rng.choice(STABLE), self.rng.choice(PROMPTS)
        response = await self._answered(http, {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 8})
        text = response.json()["choices"][0]["text"]
        if self.answers.setdefault((model, prompt), text) != text:
            self.problems.append(f"{model} answered {prompt[:20]!r} in two ways")

    async def _stream(self, http: httpx.AsyncClient) -> None:
        body = {"model": self.rng.choice(STABLE), "prompt": "Hi", "max_tokens": 20, "stream": True, "seed": 1, "n": 2}
        body |= self.rng.choice(
            ({}, {"response_format": JSON_FORM}, {"frequency_penalty": 1.5, "logprobs": 3}, {"temperature": 1e-320})
        )
        response = await self._answered(http, body)
        if not response.text.endswith("data: [DONE]\n\n") or '"error"' in response.text:
            self.problems.append(f"a stream ended with {response.text[-200:]!r}")

    async def _answered(self, http: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
        """The answer to a good request, which is sent again while the server says that it is full."""
        while True:
            response = await http.post("/v1/completions", json=body)
            self.counts[f"good {response.status_code}"] += 1
            if response.status_code == 200:
                return response
            if response.status_code != 429:
                raise OSError(f"a good request was answered {response.status_code}: {response.text[:200]}")
            await asyncio.sleep(0.1)

    async def _bad(self, http: httpx.AsyncClient) -> None:
        path, content = self.rng.choice(BAD_BODIES)
        await self._refused(http, path, content)

    async def _huge(self, http: httpx.AsyncClient) -> None:
        await self._refused(http, "/v1/completions", b'{"model": "alpha", "prompt": "' + b"x" * 5_000_000 + b'"}')

    async def _refused(self, http: httpx.AsyncClient, path: str, content: bytes) -> None:
        try:
            response = await http.post(path, content=content, headers={"Content-Type": "application/json"})
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            self.counts["bad cut off"] += 1  # refused before all of the body was sent, as the server may
            return
        self.counts[f"bad {response.status_code}"] += 1
        if response.status_code >= 500:
            self.problems.append(f"{path} answered {response.status_code} to {content[:100]!r}")

    async def _leave(self, http: httpx.AsyncClient) -> None:
        """Hang up in the middle of a stream."""
        body = {"model": self.rng.choice(STABLE), "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_bytes():
                return

    async def _passing(self, http: httpx.AsyncClient) -> None:
        """Ask for what is published, damaged and removed meanwhile: an answer or a refusal, never a failure."""
        model = self.rng.choice(("passing", "passing@1", "foreign", "alpha*0.5+passing*0.5"))
        response = await http.post("/v1/completions", json={"model": model, "prompt": "Hi", "max_tokens": 4})
        self.counts[f"passing {response.status_code}"] += 1
        if response.status_code >= 500:
            self.problems.append(f"{model} answered {response.status_code}: {response.text[:200]}")

    async def _slow(self, http: httpx.AsyncClient) -> None:
        """Begin a body and do not end it, or ask for a stream and do not read it, for a moment."""
        host, port = httpx.URL(self.url).host, httpx.URL(self.url).port
        _, writer = await asyncio.open_connection(host, port)
        body = b'{"model": "beta", "prompt": "Hi", "max_tokens": 200, "ignore_eos": true, "stream": true}'
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        writer.write(head % len(body) + (body if self.rng.random() < 0.5 else body[:10]))
        await asyncio.sleep(0.2)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def _churn(self, end: float) -> None:
        """Publish good and bad adapters under names that come and go, move an alias, remove versions."""
        from adapterhub_local.registry.gc import remove
        from tests.serve.adapter_makers import publish

        def one(number: int) -> None:
            other = dataclasses.replace(self.base, fingerprint="sha256:" + "0" * 64)
            publish(self.registry, "passing", self.base, seed=number, rank=2 + number % 7, strength=0.5 * (number % 5))
            publish(self.registry, "foreign", other if number % 2 else self.base, seed=number, rank=2)
            versions = self.registry.versions("passing")
            if len(versions) > 3:
                remove(self.registry, versions[0], force=True)
            self.registry.set_alias("alpha", "prod", 1)

        number = 0
        while time.monotonic() < end:
            number += 1
            await asyncio.to_thread(one, number)
            self.counts["published"] += 2
            await asyncio.sleep(0.5)


def prepare(home: Path) -> tuple[Any, Any]:
    """A tiny base and three adapters in a home; the registry and the base."""
    from adapterhub_local.base.add import add_base
    from adapterhub_local.registry import Registry
    from adapterhub_local.settings import home as home_at
    from tests.serve.adapter_makers import publish
    from tests.tiny import save_tiny_model

    base = add_base("tiny", save_tiny_model(home / "model"), home_at(home))
    registry = Registry(home)
    for seed, name in enumerate(("alpha", "beta", "gamma"), 1):
        publish(registry, name, base, seed=seed, rank=4 * seed, alias="prod")
    return registry, base


def idle(url: str, patience: float = 30) -> dict[str, Any]:
    """What the server holds when nothing runs; empty if that does not come."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        engine = httpx.get(f"{url}/health", trust_env=False, timeout=10).json()["engine"]
        adapters = httpx.get(f"{url}/v1/adapters", trust_env=False, timeout=10).json()["data"]
        if not (engine["running"] or engine["waiting"] or any(one["requests_now"] for one in adapters)):
            return engine
        time.sleep(0.1)
    return {}


def start(home: Path, log: Any) -> tuple[subprocess.Popen, str, float]:
    """A running server, its URL, and the seconds until it was ready."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "serve", "--base", "tiny", "--port", "0", "--max-rows", "8"]
    environment = {**os.environ, "QHUB_HOME": str(home), "QHUB_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        sys.exit(f"the server did not start: see {log.name}")
    url = line.split()[-1].removesuffix("/v1")
    httpx.get(f"{url}/ready", trust_env=False).raise_for_status()
    return process, url, time.perf_counter() - begin


def resident_mb(process: subprocess.Popen) -> float:
    """Memory of the server now."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def schemathesis(url: str, seconds: float) -> dict[str, Any]:
    """What schemathesis found: cases, and whether any was answered by a server error."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--no-color"]
    command += ["--checks", "not_a_server_error", "--max-time", str(int(seconds)), "--warnings", "off"]
    command += ["--generation-database", "none", "--request-timeout", "60", "--suppress-health-check", "all"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 300)
    cases = re.search(r"(\d+) generated", done.stdout)
    report = {"cases": int(cases[1]) if cases else 0, "is_clean": done.returncode == 0}
    return report if done.returncode == 0 else {**report, "said": done.stdout[-3000:]}


async def measure(seconds: float, seed: int, home: Path) -> dict[str, Any]:
    """The whole run: traffic and schemathesis at once, then a kill and a restart."""
    registry, base = prepare(home)
    with open(home / "serve.log", "w") as log:
        process, url, first_start = start(home, log)
        try:
            traffic = Traffic(url, registry, base, seed)
            await traffic.run(min(20.0, seconds / 4))  # buffers are grown when memory is first looked at
            before = resident_mb(process)
            found, _ = await asyncio.gather(asyncio.to_thread(schemathesis, url, seconds * 0.8), traffic.run(seconds))
            held = idle(url)
            after = resident_mb(process)
            process.kill()
            process.wait()
            process, url, second_start = start(home, log)
            again = Traffic(url, registry, base, seed)
            again.answers = traffic.answers
            await again.run(2.0)
        finally:
            process.kill()
            process.wait()
    lines = []
    for line in (home / "serve.log").read_text().splitlines():
        with contextlib.suppress(ValueError):  # the one that the kill cut off
            lines.append(json.loads(line))
    statuses = Counter(line["status"] for line in lines if line["logger"] == "serve.access")
    return {
        "seconds": seconds,
        "requests": sum(statuses.values()),
        "statuses": {str(status): count for status, count in sorted(statuses.items(), key=lambda one: str(one[0]))},
        "server_errors": sum(count for status, count in statuses.items() if (status or 0) >= 500 and status != 504),
        "kinds": dict(traffic.counts),
        "problems": (traffic.problems + again.problems)[:20],
        "num_problems": len(traffic.problems + again.problems),
        "schemathesis": found,
        "memory_mb": {"before": before, "after": after},
        "is_idle_in_the_end": bool(held),
        "ready_seconds": {"first": round(first_start, 2), "after_kill": round(second_start, 2)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Mixed good and bad traffic against a real server.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    from benchmarks.machine import machine

    os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(arguments.seconds, arguments.seed, Path(folder)))
    print(json.dumps({**result, "machine": machine()}))
    if result["server_errors"] or result["num_problems"] or not result["is_idle_in_the_end"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
