"""What the gateway's own code costs at a size: processor time of one process, without Ray and sockets."""

import asyncio
import random
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from benchmarks.cluster import prepare
from serve.cluster.call import Call, Message, Whole
from serve.cluster.merged import merged_adapters, merged_metrics
from serve.cluster.pins import affinity_of
from serve.cluster.placement import Placement, ranked
from serve.limits import Bounds, Counts, Lease

TOKENS = 64


def measured(replicas: Sequence[int], adapters: int) -> dict[str, Any]:
    """Everything: placement at each number of replicas, limits, a request's way, and what all replicas are asked."""
    return {
        "placement": {str(number): placement(number, adapters) for number in replicas},
        "limits": limits(),
        **asyncio.run(gateway(replicas)),
    }


def placement(num_replicas: int, num_adapters: int) -> dict[str, float]:
    """Microseconds to choose: by ordering all replicas, by the first of them, and remembered; bytes that are kept."""
    names = [f"{random.getrandbits(40):010x}"[:8] for _ in range(num_replicas)]
    contents = [affinity_of([(f"sha256:{number:064x}", 1.0)]) for number in range(num_adapters)]
    few, placed = contents[:100], Placement(names)
    for content in few:  # what is measured is not the first time that anything is done
        placed.tiers(content)
    found = {
        "all_ordered_us": _least(lambda: [ranked(content, names) for content in few]) / len(few),
        "first_time_us": _least(lambda: [ranked(content, names, 16) for content in few]) / len(few),
        "remembered_us": _least(lambda: [placed.tiers(content) for content in few]) / len(few),
        "base_us": _least(lambda: [placed.tiers(None) for _ in few]) / len(few),
    }
    tracemalloc.start()
    placed = Placement(names)
    for content in contents:
        placed.tiers(content)
    found["kept_bytes"] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return {name: round(value, 1) for name, value in found.items()}


def limits(count: int = 20_000) -> dict[str, float]:
    """Microseconds to count a request in and out, and bytes for each that a window remembers."""
    counts, bounds = Counts(), Bounds(10**9, 60, 10**6)

    def count_all() -> None:
        for number in range(count):
            lease = counts.admit(f"key{number % 100}", bounds)
            assert isinstance(lease, Lease), "nothing is refused"
            counts.release(lease, ran=True)

    seconds = _least(count_all, 3) / count
    tracemalloc.start()
    counts = Counts()
    count_all()
    kept = tracemalloc.get_traced_memory()[0] / count
    tracemalloc.stop()
    return {"in_and_out_us": round(seconds, 2), "remembered_bytes": round(kept)}


class Replayed:
    """Engines that answer with what a replica said once."""

    def __init__(self, said: Sequence[Message], wholes: Sequence[Whole] = ()) -> None:
        self.said = said
        self.wholes = list(wholes)

    async def answer(self, call: Call) -> AsyncIterator[Sequence[Message]]:
        """See Engines."""
        for message in self.said:
            yield [message]

    async def answers(self, call: Call) -> list[Whole]:
        """See Engines."""
        return self.wholes


async def gateway(replicas: Sequence[int]) -> dict[str, Any]:
    """A stream through the gateway, one message a token; and what all replicas say, put together."""
    from adapterhub_local.base.bases import read_record
    from adapterhub_local.base.load import load_base
    from adapterhub_local.registry import Registry
    from adapterhub_local.settings import home
    from serve.cluster.asgi import messages, whole
    from serve.cluster.gateway import create_gateway
    from serve.cluster.own_engine import Uncounted
    from serve.engine.options import EngineOptions
    from serve.http.app import create_app
    from serve.options import HttpOptions

    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), None)
        registry = Registry(home(Path(folder)))
        info = read_record(registry.home.bases / "bench")
        options = EngineOptions(max_rows=4, max_length=256)
        app = create_app(
            load_base(info, device="cpu"), registry=registry, options=options,
            http=HttpOptions(replica="r"), limits=Uncounted(),
        )  # fmt: skip
        async with app.router.lifespan_context(app):
            said = {}
            for tokens in (1, TOKENS):
                body = (
                    f'{{"model": "a1", "prompt": "Hello", "max_tokens": {tokens}, "ignore_eos": true, "stream": true}}'
                )
                call = Call("id", "POST", "/v1/completions", body=body.encode(), headers=JSON)
                said[tokens] = [each async for found in messages(app, call) for each in found]
            metrics = await whole(app, Call("id", "GET", "/metrics"), "r")
            adapters = await whole(app, Call("id", "GET", "/v1/adapters"), "r")
            found = {}
            for tokens, messages_ in said.items():
                front = create_gateway(info, registry, Replayed(messages_), HttpOptions())
                async with front.router.lifespan_context(front):
                    found[tokens] = await _asked(front, body.encode())
            a_token = (found[TOKENS] - found[1]) / (len(said[TOKENS]) - len(said[1]))
        merged = {}
        for number in replicas:
            both = [[Whole(f"r{each}", *_rest(answer)) for each in range(number)] for answer in (metrics, adapters)]
            own = CollectorRegistry()
            merged[str(number)] = {
                "metrics_ms": round(_least(lambda own=own, both=both: merged_metrics(own, both[0]), 1) / 1000, 1),
                "adapters_ms": round(_least(lambda both=both: merged_adapters(both[1]), 1) / 1000, 1),
                "metrics_bytes": len(merged_metrics(own, both[0])),
            }
    return {
        "relay": {"request_us": round(found[1]), "token_us": round(a_token, 1)},
        "merged": merged,
    }


JSON = ((b"content-type", b"application/json"),)


def _rest(answer: Whole) -> tuple[int, tuple[tuple[bytes, bytes], ...], bytes]:
    return answer.status, answer.headers, answer.body


async def _asked(app: Any, body: bytes, count: int = 100) -> float:
    """Microseconds of processor time for one request to an application, in the mean of `count`."""

    async def ask() -> None:
        is_given = False

        async def receive() -> dict[str, Any]:
            nonlocal is_given
            if not is_given:
                is_given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()
            raise AssertionError("nobody hangs up")

        async def send(message: Any) -> None:
            assert message.get("status", 200) == 200, message

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": "/v1/completions", "raw_path": b"/v1/completions", "root_path": "",
            "query_string": b"", "headers": [*JSON, (b"host", b"localhost")], "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000), "state": {},
        }  # fmt: skip
        await app(scope, receive, send)

    for _ in range(10):
        await ask()
    begun = time.process_time()
    for _ in range(count):
        await ask()
    return 1e6 * (time.process_time() - begun) / count


def _least(call: Callable[[], Any], rounds: int = 5) -> float:
    """Microseconds of processor time, the least of some rounds."""
    times = []
    for _ in range(rounds):
        begun = time.process_time()
        call()
        times.append(time.process_time() - begun)
    return 1e6 * min(times)
