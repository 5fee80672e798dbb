"""A gateway and replicas that follow one remote, each from a home of its own: what was looked up once is one thing."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.registry.push import push
from adapterhub_local.registry.remote_log import Log
from adapterhub_local.registry.remote_moves import move_alias, publish_key, revoke_key
from adapterhub_local.registry.remotes import Remote, add_remote
from adapterhub_local.registry.store import Store, open_store
from adapterhub_local.settings import home as home_at
from tests.patience import PATIENCE
from tests.serve.adapter_makers import publish
from tests.serve.cluster.conftest import Gateway
from tests.serve.splits import USERS, is_known, split_traffic


class Team:
    """A publisher's home, its remote, and a gateway before two replicas that follow it."""

    def __init__(self, folder: Path, base: Path) -> None:
        home = home_at(folder / "publisher")
        shutil.copytree(base, home.bases / "tiny")
        self.info: BaseInfo = read_record(home.bases / "tiny")
        self.registry, self.keys = Registry(home), Keys(home)
        remote: Remote = add_remote(home, "team", str(folder / "remote"))
        self.store: Store = open_store(remote)
        self.log = Log(self.store)
        self.key, self.token = self.keys.create()
        self.send("sentiment", 1)
        publish_key(self.log, self.key)
        move_alias(self.log, "sentiment", "prod", 1)
        self.gateway = Gateway(base, Registry(folder / "gateway"), 2, remote)

    def send(self, name: str, seed: int) -> str:
        """Publish a version and push it; its content digest."""
        version = publish(self.registry, name, self.info, seed=seed, rank=4)
        push(self.registry, self.store, [version])
        return version.content_digest

    def ask(self, model: str, token: str | None = None, **more) -> httpx.Response:
        """A short answer."""
        headers = {"Authorization": f"Bearer {token or self.token}"}
        body = {"model": model, "prompt": "Hi", "max_tokens": 1, **more}
        return self.gateway.http.post("/v1/completions", json=body, headers=headers)

    def soon(self, holds: Callable[[], object]) -> None:
        """Wait until something holds."""
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture(scope="module")
def team(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Three homes that follow a folder."""
    made = Team(tmp_path_factory.mktemp("team"), built_base)
    yield made
    made.gateway.stop()


def test_a_moved_alias_counts_soon_and_once(team: Team) -> None:
    """A version that nobody here has seen and that gets the alias answers soon, whatever replica is asked."""
    first = team.registry.resolve("sentiment@1").content_digest
    assert team.ask("sentiment@prod").headers["x-qhub-digest"] == first
    second = team.send("sentiment", 2)
    move_alias(team.log, "sentiment", "prod", 2, expect=1)
    team.soon(lambda: team.ask("sentiment@prod").headers.get("x-qhub-digest") == second)
    for name in list(team.gateway.engines.apps):  # each of them, the other being away
        team.gateway.engines.draining = {name}
        answer = team.ask("sentiment@prod")
        assert answer.headers["x-qhub-digest"] == second
        assert answer.headers["x-qhub-replica"] != name
    team.gateway.engines.draining = set()


def test_what_is_pinned_is_found_by_every_home(team: Team) -> None:
    """Old versions, digests and mixes are brought where they are answered, and are the same weights everywhere."""
    digests = [team.send("many", seed) for seed in (11, 12, 13)]
    team.soon(lambda: team.ask("many").headers.get("x-qhub-digest") == digests[2])
    manifest = team.registry.resolve("many@1").manifest_digest
    assert team.ask("many@2").headers["x-qhub-digest"] == digests[1]
    assert team.ask(f"many@{manifest}").headers["x-qhub-digest"] == digests[0]
    mixed = team.ask("many@1*0.5+sentiment@1*0.5")
    assert set(mixed.headers["x-qhub-adapter"].split("+")) == {"many@1*0.5", "sentiment@1*0.5"}


def test_a_home_with_versions_of_its_own_never_answers_with_them(team: Team, built_base: Path, tmp_path: Path) -> None:
    """A replica whose home has another version under the number that the gateway means says so."""
    team.send("taken", 21)
    own = Registry(tmp_path / "r0")
    other = publish(own, "taken", team.info, seed=22, rank=4)
    remote = team.store.remote
    gateway = Gateway(built_base, Registry(tmp_path / "gateway"), 1, remote)
    try:
        header = {"Authorization": f"Bearer {team.token}"}
        body = {"model": "taken@1", "prompt": "Hi", "max_tokens": 1}
        answer = gateway.http.post("/v1/completions", json=body, headers=header)
        assert other.number == 1
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    finally:
        gateway.stop()


def test_a_side_is_one_everywhere(team: Team) -> None:
    """With a split each user keeps a side, whatever replica answers."""
    for seed in (31, 32):
        team.send("split", seed)
    sides = split_traffic(team.log, "split", [("canary", 50), ("prod", 50)])

    def adapter(user: str) -> str | None:
        return team.ask("split", user=user).headers.get("x-qhub-adapter")

    team.soon(lambda: is_known(adapter, sides))
    for name in list(team.gateway.engines.apps):
        team.gateway.engines.draining = {name}
        assert {user: adapter(user) for user in USERS} == sides
    team.gateway.engines.draining = set()


def test_keys_are_the_remotes(team: Team) -> None:
    """A key that is published is let in soon, its streams run whole, and a revoked one is refused."""
    key, token = team.keys.create(adapters=("sentiment",))
    publish_key(team.log, key)
    team.soon(lambda: team.ask("sentiment", token).status_code == 200)
    assert team.ask("many", token).status_code == 403
    assert "unseen" not in team.gateway.registry.names()
    team.send("unseen", 41)
    assert team.ask("unseen", token).status_code == 403
    assert "unseen" not in team.gateway.registry.names()  # what a key may not ask is not fetched for it
    revoke_key(team.log, key.id)
    team.soon(lambda: team.ask("sentiment", token).status_code == 401)
    assert team.ask("sentiment").status_code == 200


def test_the_remote_goes_away_and_comes_back(team: Team) -> None:
    """Without the remote what is here is answered, /ready says so, and a stranger is told to try again."""
    folder = Path(team.store.url)
    before = team.ask("sentiment@prod").headers["x-qhub-digest"]
    ready = lambda: team.gateway.http.get("/ready").json()["remote"]  # noqa: E731
    assert ready() == "following"
    folder.rename(folder.parent / "gone")
    team.soon(lambda: ready() == "away")
    assert team.ask("sentiment@prod").headers["x-qhub-digest"] == before
    team.soon(lambda: team.ask("stranger").json()["error"]["code"] == "remote_unavailable")
    (folder.parent / "gone").rename(folder)
    team.soon(lambda: ready() == "following")
    third = team.send("sentiment", 3)
    move_alias(team.log, "sentiment", "prod", 3)
    team.soon(lambda: team.ask("sentiment@prod").headers["x-qhub-digest"] == third)
