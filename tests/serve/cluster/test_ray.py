"""`qhub cluster` on Ray: replicas follow a remote, are killed, scaled, and asked by many at once (`make check-ray`)."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.registry.push import push
from adapterhub_local.registry.remote_log import Log
from adapterhub_local.registry.remote_moves import move_alias, publish_key, revoke_key
from adapterhub_local.registry.remotes import add_remote
from adapterhub_local.registry.store import Store, open_store
from adapterhub_local.settings import home as home_at
from tests.patience import PATIENCE
from tests.processes import family
from tests.serve.adapter_makers import publish
from tests.serve.splits import USERS, is_known, split_traffic

pytest.importorskip("ray", reason="Ray is not installed: `make check-ray` runs these in an environment of its own")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ADAPTERS = [f"a{number}" for number in range(12)]
CONFIG = 'base = "tiny"\nremote = "{remote}"\n[replicas]\nmin = 3\ncpus = 0.1\n[gateway]\nport = 0\nwaiting = 400\n'


class Publisher:
    """Another home, whose owner pushes to the remote that the cluster follows."""

    def __init__(self, folder: Path, base: Path) -> None:
        home = home_at(folder / "publisher")
        self.info, self.registry, self.keys = read_record(base), Registry(home), Keys(home)
        self.store: Store = open_store(add_remote(home, "team", str(folder / "remote")))
        self.log = Log(self.store)

    def send(self, name: str, seed: int) -> str:
        """Publish a version and push it; its content digest."""
        version = publish(self.registry, name, self.info, seed=seed, rank=4)
        push(self.registry, self.store, [version])
        return version.content_digest


class Cluster:
    """A cluster of three replicas, and what its command line says."""

    def __init__(self, home: Path, folder: Path, publisher: Publisher) -> None:
        self.publisher = publisher
        self.environment = {**os.environ, "QHUB_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        self.environment.pop("RAY_ADDRESS", None)
        (folder / "cluster.toml").write_text(CONFIG.format(remote=publisher.store.url))
        self.state = self.qhub("up", str(folder / "cluster.toml"), "--json")
        self.url = self.state["urls"][0].removesuffix("/v1")

    def qhub(self, *arguments: str) -> dict:
        """What `qhub cluster ...` prints as JSON."""
        command = [sys.executable, "-m", "adapterhub_local", "cluster", *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if "--json" in arguments else {}

    def replicas(self) -> dict[str, int]:
        """The replicas that are ready, by name, with their processes."""
        found = self.qhub("status", "--json")["replicas"]
        return {each["replica"]: each["pid"] for each in found if each["state"] == "ready"}


@pytest.fixture(scope="module")
def cluster(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """It, ended at the end."""
    import shutil

    root = tmp_path_factory.mktemp("ray") / "home"
    home = home_at(root)
    shutil.copytree(built_base, home.bases / "tiny")
    publisher = Publisher(root.parent, built_base)
    for seed, name in enumerate(ADAPTERS):
        publisher.send(name, seed)
        move_alias(publisher.log, name, "prod", 1)
    running = None
    try:
        running = Cluster(root, root.parent, publisher)
        yield running
    finally:
        environment = {**os.environ, "QHUB_HOME": str(root)}
        command = [sys.executable, "-m", "adapterhub_local", "cluster", "down"]
        subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True)


async def ask(
    url: str,
    num: int,
    at_once: int,
    tokens: int,
    during: Callable | None = None,
    models: Sequence[str] = ADAPTERS,
    users: Sequence[str] | None = None,
    **headers: str,
) -> list[dict]:
    """`num` streams, `at_once` of them at the same time, over all models and users in turn; what came of each."""
    found: list[dict] = []
    turns = asyncio.Semaphore(at_once)

    async def stream(client: httpx.AsyncClient, number: int) -> None:
        result = {"model": models[number % len(models)], "events": 0, "error": None, "ended": False, "first": None}
        body = {"model": result["model"], "prompt": "Hello", "max_tokens": tokens, "ignore_eos": True}
        if users is not None:
            result["user"] = body["user"] = users[number % len(users)]
        async with turns:
            begun = time.monotonic()
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True, "logprobs": 0}) as answer:
                headers = {part: answer.headers.get(f"x-qhub-{part}") for part in ("replica", "adapter", "digest")}
                result |= {"status": answer.status_code, **headers}
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        result["ended"] = True
                    elif line.startswith("data: "):
                        result["first"] = result["first"] or time.monotonic() - begun
                        event = json.loads(line[6:])
                        result["error"] = event.get("error", {}).get("code")
                        result["events"] += result["error"] is None
        found.append(result)

    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, headers=headers, trust_env=False) as client:
        work = [asyncio.create_task(stream(client, number)) for number in range(num)]
        if during is not None:
            await during(found)
        await asyncio.gather(*work)
    return found


def test_adapters_keep_their_replicas(cluster: Cluster) -> None:
    """Of 300 requests for 12 adapters each adapter's go to one replica, which has it in memory; all have some."""
    found = asyncio.run(ask(cluster.url, 300, 4, 3))
    assert Counter(each["status"] for each in found) == {200: 300}
    pairs = {(each["model"], each["replica"]) for each in found}
    text = httpx.get(f"{cluster.url}/metrics", trust_env=False).text
    cold = sum(float(value) for value in re.findall(r"^qhub_adapter_loads_total\{.*\} ([\d.]+)$", text, re.MULTILINE))
    say(f"{len(pairs)} pairs of adapter and replica, {100 - cold / 3:.1f} % of 300 requests found theirs in memory")
    assert len(pairs) <= 13
    assert cold <= 15
    assert len({replica for _, replica in pairs}) >= 2


def test_killing_a_replica(cluster: Cluster) -> None:
    """Of 100 streams none ends early: those that had begun on the killed replica go on at another one."""
    before = cluster.replicas()
    victim, pid = next((name, pid) for name, pid in before.items())
    killed = []

    async def kill(found: list[dict]) -> None:
        while len(found) < 20:
            await asyncio.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        killed.append(time.monotonic())

    found = asyncio.run(ask(cluster.url, 100, 24, 60, kill))
    assert set(Counter(each["status"] for each in found)) <= {200, 429}
    assert all(each["ended"] for each in found if each["status"] == 200)
    assert not [each for each in found if each["error"] is not None]
    assert all(each["events"] == 60 for each in found if each["status"] == 200)
    text = httpx.get(f"{cluster.url}/metrics", trust_env=False).text
    moved = float(re.search(r'^qhub_gateway_lost_total{outcome="moved"} (.*)$', text, re.MULTILINE).group(1))
    while len(cluster.replicas()) < 3:
        assert time.monotonic() - killed[0] < 2 * PATIENCE  # 60 s on a quiet machine
    say(f"killed: 0 of 100 streams cut, {moved:g} moved, another replica after {time.monotonic() - killed[0]:.1f} s")
    after = cluster.replicas()
    assert victim not in after
    assert {name: after[name] for name in before if name != victim} == {n: p for n, p in before.items() if n != victim}


def test_ending_a_replica_loses_nothing(cluster: Cluster) -> None:
    """A replica that gets SIGTERM finishes what it has begun: all of 100 streams come whole, and another is there."""
    before = cluster.replicas()
    victim, pid = next(iter(before.items()))
    ended = []

    async def end(found: list[dict]) -> None:
        while len(found) < 20:
            await asyncio.sleep(0.02)
        os.kill(pid, signal.SIGTERM)
        ended.append(time.monotonic())

    found = asyncio.run(ask(cluster.url, 100, 24, 60, end))
    assert set(Counter(each["status"] for each in found)) <= {200, 429}
    assert all(each["ended"] and each["events"] == 60 for each in found if each["status"] == 200)
    deadline = time.monotonic() + 150
    while victim in (after := cluster.replicas()) or len(after) < 3:
        assert time.monotonic() < deadline
    say(f"ended: another replica after {time.monotonic() - ended[0]:.1f} s")
    assert before.items() - after.items() == {(victim, pid)}


def test_scaling_loses_nothing(cluster: Cluster) -> None:
    """From three replicas to one and back under load: every request is answered whole, and those that stay stay."""
    before = cluster.replicas()
    stop = []

    async def scale(found: list[dict]) -> None:
        for number in ("1", "3"):
            await asyncio.to_thread(cluster.qhub, "scale", number, "--json")
        stop.append(True)

    async def load() -> list[dict]:
        task = asyncio.create_task(scale([]))
        found = []
        while not stop:
            found += await ask(cluster.url, 12, 6, 20)
            if task.done():
                break
        await task
        return found

    found = asyncio.run(load())
    assert Counter(each["status"] for each in found) == {200: len(found)}
    assert all(each["ended"] and each["events"] == 20 and each["error"] is None for each in found)
    firsts = sorted(each["first"] for each in found)
    p99, median = firsts[int(0.99 * len(firsts))], firsts[len(firsts) // 2]
    say(f"scaled 3, 1, 3 under {len(found)} streams: first token p99 {p99:.3f} s, {p99 / median:.1f} times its median")
    after = cluster.replicas()
    assert len(after) == 3
    assert len(before.items() & after.items()) == 1


def test_draining_replaces_a_replica(cluster: Cluster) -> None:
    """A replica that is drained finishes, and another stands in its place; no request is lost."""
    before = cluster.replicas()
    name = next(iter(before))

    async def drain(found: list[dict]) -> None:
        await asyncio.to_thread(cluster.qhub, "drain", name)

    found = asyncio.run(ask(cluster.url, 60, 6, 30, drain))
    assert Counter(each["status"] for each in found) == {200: 60}
    assert all(each["events"] == 30 for each in found)
    deadline = time.monotonic() + 150
    while name in (after := cluster.replicas()) or len(after) < 3:
        assert time.monotonic() < deadline
    assert before.items() - after.items() == {(name, before[name])}


def test_an_alias_that_moves_counts_on_every_replica(cluster: Cluster) -> None:
    """After a push and a move from another home every replica answers with the new weights; what ran keeps its own."""
    publisher = cluster.publisher
    body = {"model": "a0@prod", "prompt": "Hello", "max_tokens": 450, "ignore_eos": True, "temperature": 0}
    first = publisher.registry.resolve("a0@1").content_digest
    with (
        httpx.Client(base_url=cluster.url, timeout=PATIENCE, trust_env=False) as client,
        client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream,
    ):
        lines = stream.iter_lines()
        events = [next(lines)]
        second = publisher.send("a0", 100)
        move_alias(publisher.log, "a0", "prod", 2, expect=1)
        moved = time.monotonic()
        while header_of(client, "x-qhub-digest", "a0@prod") != second:
            assert time.monotonic() < moved + PATIENCE
        say(f"a moved alias: after {time.monotonic() - moved:.2f} s, of 2")
        found = asyncio.run(ask(cluster.url, 60, 60, 60, models=["a0@prod"]))
        events = [json.loads(line[6:]) for line in [*events, *lines] if line.startswith("data: {")]
        whole = client.post("/v1/completions", json={**body, "model": "a0@1"}).json()
    assert {each["digest"] for each in found} == {second}
    assert len({each["replica"] for each in found}) == 3
    assert stream.headers["x-qhub-digest"] == first
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]


def test_a_user_keeps_a_side_on_every_replica(cluster: Cluster) -> None:
    """With a split of 10 to 90 each user gets one side, whatever replica answers, and both sides have users."""
    publisher = cluster.publisher
    for seed in (201, 202):
        publisher.send("split", seed)
    sides = split_traffic(publisher.log, "split", [("canary", 10), ("prod", 90)])
    deadline = time.monotonic() + PATIENCE
    with httpx.Client(base_url=cluster.url, timeout=PATIENCE, trust_env=False) as client:
        while not is_known(lambda user: header_of(client, "x-qhub-adapter", "split", user=user), sides):
            assert time.monotonic() < deadline
    found = asyncio.run(ask(cluster.url, 240, 80, 20, models=["split"], users=USERS))
    assert {each["status"] for each in found} == {200}
    assert {(each["user"], each["adapter"]) for each in found} == set(sides.items())
    assert len({each["replica"] for each in found if each["adapter"] == "split@1"}) == 3


def test_who_hangs_up_frees_the_row(cluster: Cluster) -> None:
    """A client that leaves in the middle of a stream ends the work on its replica."""
    body = {"model": "a0", "prompt": "Hello", "max_tokens": 450, "ignore_eos": True, "stream": True, "logprobs": 0}
    with httpx.Client(base_url=cluster.url, timeout=PATIENCE, trust_env=False) as client:
        for _ in range(4):
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        deadline = time.monotonic() + PATIENCE
        while re.search(r"^qhub_requests_running\{.*\} [1-9]", client.get("/metrics").text, re.MULTILINE):
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_nothing_else_answers(cluster: Cluster) -> None:
    """No port of the cluster but the gateway's answers a request, and Ray's own want its token."""
    head = json.loads((Path(cluster.environment["QHUB_HOME"]) / "cluster/head.json").read_text())["pid"]
    own = int(cluster.url.rpartition(":")[2])
    ports = listening(head) - {own}
    assert len(ports) > 5
    for port in ports:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=2, trust_env=False)
        except httpx.HTTPError:
            continue
        assert answer.status_code >= 400 or "a0@prod" not in answer.text, port  # Ray's own metrics may be read
    code = f"import ray; ray.init('127.0.0.1:{head_port(cluster)}', logging_level='ERROR')"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_gcs_rpc_server_reconnect_timeout_s": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120)
    assert done.returncode != 0


def test_a_rate_is_exact(cluster: Cluster) -> None:
    """Of 60 requests at once with a key of 10 a minute exactly 10 are answered, whatever replicas they are for."""
    keys = Keys(home_at(cluster.environment["QHUB_HOME"]))
    key, token = keys.create(rate="10/min")
    try:
        found = asyncio.run(ask(cluster.url, 60, 60, 3, authorization=f"Bearer {token}"))
        assert Counter(each["status"] for each in found) == {200: 10, 429: 50}
        assert httpx.get(f"{cluster.url}/v1/models", trust_env=False).status_code == 401
    finally:
        keys.revoke(key.id)
    again = httpx.get(f"{cluster.url}/v1/models", headers={"authorization": f"Bearer {token}"}, trust_env=False)
    assert again.status_code == 401


def test_a_key_is_the_remotes(cluster: Cluster) -> None:
    """A key that is published at the remote is let in soon; revoked there, it is refused, and its streams end."""
    publisher = cluster.publisher
    key, token = publisher.keys.create()
    publish_key(publisher.log, key)
    header = {"authorization": f"Bearer {token}"}
    with httpx.Client(base_url=cluster.url, timeout=PATIENCE, headers=header, trust_env=False) as client:
        published = time.monotonic()
        while client.get("/v1/models").status_code != 200:
            assert time.monotonic() < published + PATIENCE
        say(f"a published key: let in after {time.monotonic() - published:.2f} s")
        found = asyncio.run(ask(cluster.url, 24, 24, 20, **header))
        assert {(each["status"], each["ended"], each["error"]) for each in found} == {(200, True, None)}
        revoke_key(publisher.log, key.id)
        revoked = time.monotonic()
        while client.get("/v1/models").status_code != 401:
            assert time.monotonic() < revoked + PATIENCE
        say(f"a revoked key: refused after {time.monotonic() - revoked:.2f} s, of 2")
        found = asyncio.run(ask(cluster.url, 24, 24, 20, **header))
        assert {each["status"] for each in found} == {401}


def header_of(client: httpx.Client, header: str, model: str, **more: str) -> str | None:
    """What a header of a short answer of a name says now."""
    body = {"model": model, "prompt": "Hi", "max_tokens": 1, **more}
    return client.post("/v1/completions", json=body).headers.get(header)


def say(text: str) -> None:
    """Show what was measured."""
    print(text)  # noqa: T201


def head_port(cluster: Cluster) -> int:
    """Where Ray itself listens."""
    text = (Path(cluster.environment["QHUB_HOME"]) / "cluster/head.json").read_text()
    return int(json.loads(text)["address"].rpartition(":")[2])


def listening(pid: int) -> set[int]:
    """The TCP ports at which a process and its descendants listen."""
    inodes = set()
    for each in family(pid):
        try:
            inodes |= {os.readlink(descriptor) for descriptor in Path(f"/proc/{each}/fd").iterdir()}
        except OSError:
            continue
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == "0A" and f"socket:[{parts[9]}]" in inodes:
                ports.add(int(parts[1].rpartition(":")[2], 16))
    return ports
