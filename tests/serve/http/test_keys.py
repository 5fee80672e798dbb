"""Keys: stored as hashes, with scopes, adapters and limits; and what the server refuses without them."""

import asyncio
import json
import pickle
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from click.testing import CliRunner

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.main import qhub
from adapterhub_local.errors import Corrupt, InputError, NotFound
from adapterhub_local.keys import Key, Keys, parse_rate
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from serve.__main__ import command
from serve.access import Access, Scope
from serve.auth import Gate
from serve.engine.options import EngineOptions
from serve.errors import Forbidden, Throttled, Unauthorized
from serve.limits import Bounds, Counts, Lease, LocalLimits, Refusal
from serve.listen import is_loopback
from tests.serve.adapter_makers import publish
from tests.serve.conftest import Server
from tests.tiny import byte_tokenizer

CHAT = "/v1/chat/completions"
ANSWERS = Access(Scope.INFER, is_counted=True)


def test_a_key_is_found_by_its_secret_alone(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token finds its key; one wrong letter, a revoked or an expired key finds nothing."""
    keys = Keys(home)
    key, token = keys.create(scopes=("infer",), adapters=("sql*",), rate="60/min", concurrency=2, note="team a")
    assert Keys(home).find(token) == key
    for wrong in (token[:-1] + ("a" if token[-1] != "a" else "b"), token.upper(), token[5:], "", "qhub-" + key.id, "é"):
        assert keys.find(wrong) is None
    assert (key.allows("sql-tools"), key.allows("tone"), key.window) == (True, False, (60, 60))
    keys.revoke(key.id)
    assert keys.find(token) is None
    _, short = keys.create(expires="1h")
    assert keys.find(short)
    monkeypatch.setattr("adapterhub_local.keys._now", lambda: "2999-01-01T00:00:00Z")
    assert keys.find(short) is None


def test_the_file_holds_no_secret(home: Home) -> None:
    """What is stored is a hash, in a file for its owner alone."""
    _, token = Keys(home).create()
    secret = token.split("-", 2)[2]
    assert secret not in home.keys.read_text()
    assert stat.S_IMODE(home.keys.stat().st_mode) == 0o600


def test_many_make_keys_at_once(home: Home) -> None:
    """Keys made by many at once are all there, and a second reader sees each change at once."""
    reader = Keys(home)
    with ThreadPoolExecutor(8) as threads:
        tokens = list(threads.map(lambda _: Keys(home).create()[1], range(16)))
    assert all(reader.find(token) for token in tokens)
    Keys(home).revoke(tokens[3].split("-")[1])
    assert [reader.find(token) is None for token in tokens] == [number == 3 for number in range(16)]


def test_a_damaged_file_lets_nobody_in(home: Home) -> None:
    """Keys that cannot be read are an error, not an open door."""
    home.root.mkdir(parents=True)
    for text in ("", "{", "{}", '{"keys": [{}]}', "[]"):
        home.keys.write_text(text)
        with pytest.raises(Corrupt):
            Gate(Keys(home)).identify(CHAT, ANSWERS, None)


@pytest.mark.parametrize("rate", ["", "60", "0/min", "60/week", "-1/s", "1.5/s", "60 /min", "9999999/s"])
def test_bad_rates(rate: str) -> None:
    """What is not a rate is refused with an example."""
    with pytest.raises(InputError, match="60/min"):
        parse_rate(rate)


def test_gate(home: Home) -> None:
    """Open without keys; with one, each path wants a key with its scope, except for what asks if the server lives."""
    gate = Gate(Keys(home))
    assert gate.identify(CHAT, ANSWERS, None) is None
    with pytest.raises(Unauthorized):
        Gate(Keys(home), is_required=True).identify(CHAT, ANSWERS, None)
    key, infer = Keys(home).create()
    admin_key, admin = Keys(home).create(scopes=("admin",))
    assert gate.identify(CHAT, ANSWERS, f"Bearer {infer}") == key
    assert gate.identify("/v1/adapters", Access(Scope.ADMIN), f"bearer  {admin}") == admin_key
    assert gate.identify("/metrics", Access(Scope.ANY), f"Bearer {infer}") == key
    assert gate.identify("/ready", Access(Scope.OPEN), None) is None
    for header in (None, "", "Bearer", "Bearer ", infer, f"Basic {infer}", f"Bearer {infer}x"):
        with pytest.raises(Unauthorized):
            gate.identify(CHAT, ANSWERS, header)
    with pytest.raises(Forbidden):
        gate.identify("/v1/load_lora_adapter", Access(Scope.ADMIN), f"Bearer {infer}")
    with pytest.raises(Forbidden):
        gate.identify(CHAT, ANSWERS, f"Bearer {admin}")
    Keys(home).revoke(key.id)
    Keys(home).revoke(admin_key.id)
    with pytest.raises(Unauthorized):  # revoking the last key does not open the door
        gate.identify(CHAT, ANSWERS, None)


class Doorman:
    """A gate with a clock of its own, whose steps are taken one after another."""

    def __init__(self, home: Home) -> None:
        self.now = 1000.0
        self.gate = Gate(Keys(home), limits=LocalLimits(Counts(lambda: self.now)))

    def enter(self, key: Key, access: Access = ANSWERS) -> Lease | None:
        """Count in, or raise Throttled."""
        return asyncio.run(self.gate.enter(access, key))

    def leave(self, lease: Lease | None, status: int = 200) -> None:
        """Count out."""
        asyncio.run(self.gate.leave(lease, status))


def test_rate_and_concurrency(home: Home) -> None:
    """No window of the period has more requests than the rate, and no more run at once than the key may."""
    door = Doorman(home)
    key, _ = Keys(home).create(rate="3/min", concurrency=2)
    first = door.enter(key)
    door.enter(key)
    with pytest.raises(Throttled, match="2 requests at once"):
        door.enter(key)
    door.leave(first)
    door.leave(first)  # once is enough
    door.now += 20
    door.leave(door.enter(key))
    with pytest.raises(Throttled) as caught:
        door.enter(key)
    assert caught.value.seconds == 40
    door.now += 41
    door.enter(key)
    with pytest.raises(Throttled, match="2 requests at once"):
        door.enter(key)
    assert door.enter(key, Access(Scope.ANY)) is None  # only answers count


def test_what_was_refused_is_given_back(home: Home) -> None:
    """A refused request leaves the rate as it was, and so many of them are throttled as might have run."""
    door = Doorman(home)
    key, _ = Keys(home).create(rate="2/min")
    first = door.enter(key)
    door.now += 10
    door.leave(door.enter(key), 403)
    door.leave(first, 200)
    door.now += 10
    door.leave(door.enter(key), 400)
    with pytest.raises(Throttled, match="refused as often") as caught:
        door.enter(key)
    assert caught.value.seconds == 50
    door.now += 51  # the first of the refused and the one that ran are forgotten
    door.leave(door.enter(key), 200)
    door.leave(door.enter(key), 504)  # it ran
    with pytest.raises(Throttled, match="2/min: try"):
        door.enter(key)


def test_what_limits_pass_can_be_sent_to_another_process() -> None:
    """Bounds, leases and refusals survive being pickled, and a lease that came back so is released."""
    counts = Counts()
    bounds = pickle.loads(pickle.dumps(Bounds(5, 60, 1)))
    lease = pickle.loads(pickle.dumps(counts.admit("aa", bounds)))
    assert pickle.loads(pickle.dumps(counts.admit("aa", bounds))) == Refusal("concurrency", 1.0)
    counts.release(lease, ran=True)
    assert isinstance(counts.admit("aa", bounds), Lease)


def test_verbs(home: Home) -> None:
    """`qhub key` makes a key that is shown once, lists without secrets, and revokes."""
    run = CliRunner().invoke
    made = run(qhub, ["key", "create", "--scope", "infer", "--adapters", "sql*", "--rate", "60/min", "--json"])
    assert made.exit_code == 0, made.output
    entry = json.loads(made.stdout)
    assert Keys(home).find(entry["key"]).id == entry["id"]
    listed = json.loads(run(qhub, ["key", "list", "--json"]).stdout)
    assert [(one["id"], one["adapters"], one["is_valid"]) for one in listed] == [(entry["id"], ["sql*"], True)]
    assert "digest" not in listed[0]
    assert "sql*" in run(qhub, ["key", "list"]).stdout
    revoked = run(qhub, ["key", "revoke", entry["id"]])
    assert revoked.exit_code == 0
    assert "No valid key is left" in revoked.stderr
    assert "revoked" in run(qhub, ["key", "list"]).stdout
    assert isinstance(run(qhub, ["key", "revoke", "nothing"]).exception, NotFound)
    assert isinstance(run(qhub, ["key", "create", "--rate", "often"]).exception, InputError)


def test_an_open_address_wants_a_key(tiny_base: BaseInfo) -> None:
    """Without a valid key the server does not listen where others could ask it."""
    for host in ("0.0.0.0", "::"):
        result = CliRunner().invoke(command, ["--host", host, "--port", "0"])
        assert isinstance(result.exception, InputError)
        assert "qhub key create" in str(result.exception)
    assert is_loopback("127.0.0.1")
    assert is_loopback("localhost")
    assert not is_loopback("no.such.host.invalid")


@pytest.fixture
def guarded(built_base, home: Home):
    """A server with two adapters and a key for one of them, for an administrator, and for two requests an hour."""
    registry = Registry(home)
    base = read_record(built_base)
    publish(registry, "sql-tools", base, seed=1)
    publish(registry, "tone", base, seed=2)
    server = Server(load_base(base, device="cpu"), registry, options=EngineOptions(max_rows=1))
    keys = Keys(home)
    made = {
        "sql": keys.create(adapters=("sql*",)),
        "admin": keys.create(scopes=("admin",)),
        "few": keys.create(rate="2/h"),
        "one": keys.create(concurrency=1),
        "low": keys.create(priority="low"),
        "high": keys.create(priority="high"),
    }
    server.keys = {name: token for name, (_, token) in made.items()}
    server.health_headers = {"Authorization": f"Bearer {server.keys['admin']}"}
    server.ids = {name: key.id for name, (key, _) in made.items()}
    yield server
    server.stop()


def test_keys_over_http(guarded: Server, home: Home) -> None:
    """The official client meets 401, 403 and 429 as OpenAI gives them, and what its key allows works."""
    assert guarded.http.get("/health").status_code == 200
    assert guarded.http.get("/metrics").status_code == 401

    def client(name: str) -> openai.OpenAI:
        return guarded.client.with_options(api_key=guarded.keys[name])

    def ask(name: str, model: str) -> str:
        return client(name).completions.create(model=model, prompt="Hi", max_tokens=2).model

    with pytest.raises(openai.AuthenticationError) as refused:
        guarded.client.completions.create(model="tone", prompt="Hi")
    assert refused.value.code == "invalid_api_key"
    assert ask("sql", "sql-tools") == "sql-tools"
    assert ask("sql", "tiny:sql-tools@1") == "tiny:sql-tools@1"
    for model in ("tone", "tiny", "tiny:tone", "nothing", "tone@1"):
        with pytest.raises(openai.PermissionDeniedError):
            ask("sql", model)
    with pytest.raises(openai.NotFoundError):
        ask("sql", "sql-nothing")
    assert {model.id for model in client("sql").models.list()} == {"sql-tools", "sql-tools@1"}
    with pytest.raises(openai.PermissionDeniedError):
        client("sql").models.retrieve("tone")
    header = {"Authorization": f"Bearer {guarded.keys['admin']}"}
    assert guarded.http.get("/v1/adapters", headers=header).status_code == 200
    with pytest.raises(openai.PermissionDeniedError):
        ask("admin", "tone")
    with pytest.raises(openai.NotFoundError):  # it does not run, and costs nothing of the rate
        ask("few", "nothing")
    assert [ask("few", "tone"), ask("few", "tone")] == ["tone", "tone"]
    with pytest.raises(openai.RateLimitError) as limited:
        ask("few", "tone")
    assert 3000 < int(limited.value.response.headers["Retry-After"]) <= 3600
    Keys(home).revoke(guarded.ids["sql"])
    with pytest.raises(openai.AuthenticationError):
        ask("sql", "sql-tools")


def test_concurrency_over_http(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key for one request at once is 429 for a second, and free again however the first one ends."""
    header = {"Authorization": f"Bearer {guarded.keys['one']}"}
    body = {"model": "tone", "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True, "logprobs": 0}
    with (
        guarded.http.stream("POST", "/v1/completions", json=body, headers=header) as response,
        monkeypatch.context() as m,
    ):
        guarded.slow_down(m)
        lines = response.iter_lines()
        next(lines)
        second = guarded.http.post("/v1/completions", json=body, headers=header)
        assert second.status_code == 429
        assert second.headers["Retry-After"] == "1"
    guarded.wait_until_idle()
    done = threading.Event()
    for _ in range(100):
        answer = guarded.http.post("/v1/completions", json={**body, "stream": False, "max_tokens": 1}, headers=header)
        if answer.status_code == 200:
            done.set()
            break
    assert done.is_set()


def test_priority_over_http(guarded: Server) -> None:
    """While there is no room, requests of a key of high priority go before those that came earlier."""
    header = {name: {"Authorization": f"Bearer {token}"} for name, token in guarded.keys.items()}
    body = {"model": "tone", "max_tokens": 1, "ignore_eos": True}

    def ask(name: str) -> int:
        return guarded.http.post("/v1/completions", json={**body, "prompt": name}, headers=header[name]).status_code

    with ThreadPoolExecutor(3) as threads:
        answered = []
        with guarded.service.engine._between_steps():
            for number, name in enumerate(("low", "one", "high"), 1):
                answered.append(threads.submit(ask, name))
                while guarded.service.engine.snapshot().waiting < number:
                    assert not answered[-1].done()
                    time.sleep(0.01)
            queue = [request.prompt for request in guarded.service.engine.scheduler.queue]
    assert queue == [tuple(byte_tokenizer().encode(name)) for name in ("high", "one", "low")]
    assert [each.result() for each in answered] == [200, 200, 200]


def test_priorities(home: Home) -> None:
    """A key of before there were priorities is a normal one; what is not one of them is refused, or not read."""
    keys = Keys(home)
    keys.create(priority="high")
    text = home.keys.read_text()
    entry = json.loads(text)["keys"][0]
    home.keys.write_text(json.dumps({"keys": [{name: entry[name] for name in entry if name != "priority"}]}))
    assert [key.priority for key in Keys(home).all()] == ["normal"]
    with pytest.raises(InputError, match="'urgent' is not a priority: it is low, normal or high"):
        keys.create(priority="urgent")
    home.keys.write_text(text.replace('"high"', '"urgent"'))
    with pytest.raises(Corrupt):
        Keys(home).all()
