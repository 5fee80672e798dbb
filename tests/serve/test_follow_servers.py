"""Several servers that follow one remote and share one Redis answer as one: real processes, asked over HTTP."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.registry.push import push
from adapterhub_local.registry.remote_log import Log
from adapterhub_local.registry.remote_moves import move_alias, publish_key, revoke_key
from adapterhub_local.registry.remotes import add_remote
from adapterhub_local.registry.store import Store, open_store
from adapterhub_local.settings import home as home_at
from tests.patience import PATIENCE
from tests.serve.adapter_makers import publish
from tests.serve.redis_server import RedisServer
from tests.serve.splits import USERS, is_known, split_traffic

SERVERS = 3
SOON = 2.0  # seconds in which every server knows


class Replica:
    """A server in a process of its own, with a home of its own that has nothing but the base."""

    def __init__(self, home: Path, base: Path, remote: str, limits: str) -> None:
        self.home, self.base, self.remote, self.limits = home, base, remote, limits
        self.start()

    def start(self) -> None:
        """Begin to start; `wait` waits until it answers."""
        shutil.copytree(self.base, home_at(self.home).bases / "tiny", dirs_exist_ok=True)
        words = ["--base", "tiny", "--port", "0", "--max-rows", "8", "--remote", self.remote, "--limits", self.limits]
        environment = {**os.environ, "QHUB_HOME": str(self.home), "QHUB_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve", *words, "--no-access-log"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def wait(self) -> None:
        """Wait until it answers."""
        assert self.process.stdout
        assert self.process.stderr
        line = self.process.stdout.readline()
        assert line.startswith("Serving tiny"), self.process.stderr.read()
        self.http = httpx.Client(base_url=line.split()[-1].removesuffix("/v1"), timeout=PATIENCE, trust_env=False)

    def ask(self, token: str, model: str, user: str | None = None) -> httpx.Response:
        """A short answer."""
        body = {"model": model, "prompt": "Hi", "max_tokens": 1, **({"user": user} if user else {})}
        return self.http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {token}"})

    def digest(self, token: str, model: str) -> str | None:
        """Which weights answer."""
        return self.ask(token, model).headers.get("x-qhub-digest")

    def stop(self, number: int = signal.SIGTERM) -> str:
        """End it; what it logged."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=PATIENCE)
        return errors


class Team:
    """A publisher's home, its remote, and the servers that follow it."""

    def __init__(self, folder: Path, base: Path, limits: str) -> None:
        home = home_at(folder / "publisher")
        shutil.copytree(base, home.bases / "tiny")
        self.info: BaseInfo = read_record(home.bases / "tiny")
        self.registry, self.keys = Registry(home), Keys(home)
        self.store: Store = open_store(add_remote(home, "team", str(folder / "remote")))
        self.log = Log(self.store)
        self.token = self.key()[1]
        self.send("sentiment", 1)
        move_alias(self.log, "sentiment", "prod", 1)
        # one is given a URL, as a machine that comes anew is
        self.replicas = [Replica(folder / f"home-{index}", base, self.store.url, limits) for index in range(SERVERS)]
        for replica in self.replicas:
            replica.wait()

    def key(self, **limits) -> tuple[str, str]:
        """Publish a new key: its id and what clients send."""
        key, token = self.keys.create(**limits)
        publish_key(self.log, key)
        return key.id, token

    def send(self, name: str, seed: int) -> str:
        """Publish a version and push it; its content digest."""
        version = publish(self.registry, name, self.info, seed=seed)
        push(self.registry, self.store, [version])
        return version.content_digest

    def soon(self, what: str, holds: Callable[[Replica], object]) -> None:
        """Wait until something holds at every server, and show how long it took."""
        start = time.monotonic()
        waiting = list(self.replicas)
        while waiting := [replica for replica in waiting if not holds(replica)]:
            assert time.monotonic() < start + PATIENCE, what
            time.sleep(0.02)
        print(f"{what}: everywhere after {time.monotonic() - start:.2f} s, of {SOON} s")  # noqa: T201


@pytest.fixture(scope="module")
def team(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Three servers that follow a folder and count in one Redis."""
    redis = RedisServer()
    with contextlib.ExitStack() as stack:
        stack.callback(redis.close)
        made = Team(tmp_path_factory.mktemp("team"), built_base, redis.url)
        yield made
        for replica in made.replicas:
            assert "Traceback" not in replica.stop()


def test_an_alias_that_moves_is_answered_everywhere(team: Team) -> None:
    """A version that is pushed and gets the alias answers on every server soon; a stream that runs keeps its own."""
    first = team.registry.resolve("sentiment@1").content_digest
    assert [replica.digest(team.token, "sentiment@prod") for replica in team.replicas] == [first] * SERVERS
    body = {"model": "sentiment@prod", "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True}
    header = {"Authorization": f"Bearer {team.token}"}
    with team.replicas[0].http.stream("POST", "/v1/completions", json=body, headers=header) as stream:
        lines = stream.iter_lines()
        begun = next(lines)
        second = team.send("sentiment", 2)
        move_alias(team.log, "sentiment", "prod", 2, expect=1)
        team.soon("a moved alias", lambda replica: replica.digest(team.token, "sentiment@prod") == second)
        events = [json.loads(line.removeprefix("data: ")) for line in [begun, *lines] if line.startswith("data: {")]
    assert stream.headers["x-qhub-digest"] == first
    assert not [event for event in events if "error" in event]
    assert len({event.get("system_fingerprint") for event in events}) == 1
    assert [replica.digest(team.token, "sentiment") for replica in team.replicas] == [second] * SERVERS


def test_a_user_stays_on_a_side_everywhere(team: Team) -> None:
    """With a split of 10 to 90 each user gets the same side from every server, and both sides have users."""
    team.send("split", 3)
    team.send("split", 4)
    sides = split_traffic(team.log, "split", [("canary", 10), ("prod", 90)])

    def adapter(replica: Replica, user: str) -> str | None:
        return replica.ask(team.token, "split", user).headers.get("x-qhub-adapter")

    team.soon("a split", lambda replica: is_known(partial(adapter, replica), sides))
    for replica in team.replicas:
        assert {user: adapter(replica, user) for user in USERS} == sides


def test_a_revoked_key_is_refused_everywhere(team: Team) -> None:
    """A key that is published opens every server soon; revoked, it opens none."""
    identity, token = team.key()
    team.soon("a new key", lambda replica: replica.ask(token, "sentiment").status_code == 200)
    revoke_key(team.log, identity)
    team.soon("a revoked key", lambda replica: replica.ask(token, "sentiment").status_code == 401)
    assert all(replica.ask(team.token, "sentiment").status_code == 200 for replica in team.replicas)


def test_limits_are_those_of_one_server(team: Team) -> None:
    """Of 60 requests at once to three servers with a key of 10 a minute, exactly 10 run; with one of 2 at once, 2."""
    _, token = team.key(rate="10/min")
    team.soon("a limited key", lambda replica: replica.ask(token, "nobody").status_code == 404)
    with ThreadPoolExecutor(60) as threads:
        answers = list(threads.map(lambda index: team.replicas[index % SERVERS].ask(token, "sentiment"), range(60)))
    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [429] * 50
    assert all(0 < int(answer.headers["retry-after"]) <= 60 for answer in answers if answer.status_code == 429)
    _, token = team.key(concurrency=2)
    team.soon("another", lambda replica: replica.ask(token, "nobody").status_code == 404)
    # eight answers, without guesses: a tiny model may have said all before the third server is asked
    body = {"model": "sentiment", "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True}
    body |= {"n": 8, "logprobs": 0}
    header = {"Authorization": f"Bearer {token}"}
    with contextlib.ExitStack() as stack:
        for replica in team.replicas[:2]:
            stream = stack.enter_context(replica.http.stream("POST", "/v1/completions", json=body, headers=header))
            assert stream.status_code == 200
        assert team.replicas[2].ask(token, "sentiment").status_code == 429
    assert team.replicas[2].ask(token, "sentiment").status_code in (200, 429)


def test_what_cannot_be_answered_says_why(team: Team) -> None:
    """A name nobody has is a 404, an adapter of another base a 400; who may operate the server sees what it refused."""
    _, admin = team.key(scopes=("admin",))
    lineage = {"base": {"name": "other", "fingerprint": "sha256:" + "1" * 64}}
    files = {file.path: team.registry.blobs.path(file.digest) for file in team.registry.resolve("sentiment@1").files}
    push(team.registry, team.store, [team.registry.publish("foreign", files, lineage)])
    team.soon("a foreign adapter", lambda replica: replica.ask(team.token, "foreign").status_code == 400)
    header = {"Authorization": f"Bearer {admin}"}
    team.soon("an admin's key", lambda replica: replica.http.get("/v1/server", headers=header).status_code == 200)
    for replica in team.replicas:
        error = replica.ask(team.token, "foreign").json()["error"]
        assert (error["code"], error["param"]) == ("adapter_incompatible", "model")
        assert "was made for base 'other', not for 'tiny'" in error["message"]
        assert replica.ask(team.token, "nobody").status_code == 404
        state = replica.http.get("/v1/server", headers=header).json()["remote"]
        assert (state["state"], list(state["refused"])) == ("following", ["foreign@1"])


def test_the_remote_goes_away_and_comes_back(team: Team) -> None:
    """Without its remote a server answers as before and says so; what was said meanwhile counts when it is back."""
    folder = Path(team.store.url)
    before = team.replicas[0].digest(team.token, "sentiment@prod")
    folder.rename(folder.parent / "gone")
    team.soon("a lost remote", lambda replica: replica.http.get("/ready").json()["remote"] == "away")
    for replica in team.replicas:
        assert replica.http.get("/ready").status_code == 200
        assert replica.digest(team.token, "sentiment@prod") == before
        assert replica.ask(team.token, "stranger").json()["error"]["code"] == "remote_unavailable"
    (folder.parent / "gone").rename(folder)
    third = team.send("sentiment", 5)
    move_alias(team.log, "sentiment", "prod", 3)
    team.soon("a remote that is back", lambda replica: replica.digest(team.token, "sentiment@prod") == third)


def test_a_lost_home_comes_back(team: Team) -> None:
    """A server whose home was deleted, and whose process was killed, is the same again when it is started again."""
    replica, other = team.replicas[:2]
    asked = ("sentiment", "sentiment@prod", "sentiment@1")
    before = [other.digest(team.token, model) for model in asked]
    replica.stop(signal.SIGKILL)
    shutil.rmtree(replica.home)
    replica.start()
    replica.wait()
    assert [replica.digest(team.token, model) for model in asked] == before
    for user in ("user-1", "user-2", "user-3"):
        sides = [each.ask(team.token, "sentiment", user).headers["x-qhub-adapter"] for each in (replica, other)]
        assert sides[0] == sides[1]
    assert replica.ask("qhub-00000000-" + "a" * 43, "sentiment").status_code == 401
