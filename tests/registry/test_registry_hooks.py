"""Hooks: real receivers on the loopback, real commands, and processes killed between a change and its hook."""

import hashlib
import hmac
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from adapterhub_local.actor import acting_as
from adapterhub_local.errors import InputError, InUse, NotFound
from adapterhub_local.registry import Registry
from adapterhub_local.registry.config import Hook, parse_config, read_config
from adapterhub_local.registry.config_edit import add_hook, remove_hook
from adapterhub_local.registry.gc import remove
from adapterhub_local.registry.history import history
from adapterhub_local.registry.hooks.deliver import deliver
from adapterhub_local.registry.hooks.state import State, read_log
from adapterhub_local.registry.marks import add_tags
from adapterhub_local.registry.rebuild import rebuild
from adapterhub_local.settings import environment_in
from tests.patience import PATIENCE
from tests.stores import LINEAGE, files


class Receiver:
    """An HTTP server that keeps what is posted to it, and answers as `answer` says for each try."""

    def __init__(self, answer: Callable[[int], int]) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                status = answer(len(receiver.got))
                self.send_response(status)
                if status == 307:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def changes(self) -> list[dict[str, Any]]:
        return [json.loads(body)["change"] for _, body in self.got]


@pytest.fixture
def receiver() -> Iterator[Callable[[Callable[[int], int]], Receiver]]:
    """Makes receivers, which end with the test."""
    made: list[Receiver] = []

    def make(answer: Callable[[int], int] = lambda number: 204) -> Receiver:
        made.append(Receiver(answer))
        return made[-1]

    yield make
    for one in made:
        one.server.shutdown()
        one.server.server_close()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A home with one version, from before there were hooks."""
    made = Registry(tmp_path / "home")
    made.publish("a", files(0), LINEAGE)
    return made


def settled(registry: Registry, name: str) -> State:
    """What a hook has left once no process tells it anything any more."""
    hook = next(one for one in read_config(registry.home).hooks if one.name == name)
    while (state := deliver(registry, hook)) is None:
        time.sleep(0.05)
    return state


def test_a_receiver_that_fails_twice_is_told_again(registry: Registry, receiver: Any) -> None:
    """The same body, under one delivery id, signed as GitHub signs; each try is recorded, and then it is not told more.

    Nobody runs a verb for that: the change itself starts what tells the hook.
    """
    ci = receiver(lambda number: 503 if number <= 2 else 200)
    hook = add_hook(registry, Hook("ci", url=ci.url))
    secret = (registry.home.root / str(hook.secret_file)).read_bytes()
    assert (registry.home.root / str(hook.secret_file)).stat().st_mode & 0o077 == 0
    with acting_as("ada"):
        registry.publish("a", files(1), LINEAGE)
    assert settled(registry, "ci").waiting == {}
    assert len(ci.got) == 3
    assert len({(headers["x-qhub-delivery"], body) for headers, body in ci.got}) == 1
    for headers, body in ci.got:
        signed = hmac.new(secret, body, hashlib.sha256).hexdigest()
        assert headers["x-hub-signature-256"] == f"sha256={signed}"
        assert headers["x-qhub-event"] == "publish"
    change = ci.changes[0]
    assert (change["reference"], change["actor"], change["what"]) == ("a@2", "ada", "published a@2 (train)")
    tries = [(entry["attempt"], entry["state"], entry["said"]) for entry in reversed(read_log(registry.home, "ci", 9))]
    assert tries == [(1, "failed", "HTTP 503"), (2, "failed", "HTTP 503"), (3, "delivered", "HTTP 200")]


def test_a_change_neither_waits_for_a_hook_nor_fails_with_it(registry: Registry, receiver: Any) -> None:
    """While a receiver does not answer at all, and another's address is closed, changes go on."""
    gate = threading.Event()
    slow = receiver(lambda number: (gate.wait(30) and 200) or 200)
    add_hook(registry, Hook("slow", url=slow.url))
    add_hook(registry, Hook("closed", url="http://127.0.0.1:9/"))
    for seed in range(1, 4):
        registry.publish("a", files(seed), LINEAGE)
    assert len(registry.versions("a")) == 4
    remove_hook(registry, "closed")
    gate.set()
    assert settled(registry, "slow").waiting == {}
    assert [change["reference"] for change in slow.changes] == ["a@2", "a@3", "a@4"]


def test_a_hook_is_told_what_it_asked_for(registry: Registry, receiver: Any) -> None:
    """Only its events and names, in their order; what happened before it was added is not for it."""
    every, some = receiver(), receiver()
    add_hook(registry, Hook("every", url=every.url))
    add_hook(registry, Hook("some", url=some.url, events=("tag", "alias"), names=("b*",)))
    version = registry.publish("bird", files(1), LINEAGE, alias="prod")
    registry.add_evaluation(version, "task", {"adapter": {"exact_match": 1.0}})
    add_tags(registry, version, ("good",))
    registry.set_alias("a", "prod", 1)
    remove(registry, version, force=True)
    settled(registry, "every")
    settled(registry, "some")
    assert [change["event"] for change in every.changes] == [
        "version", "alias", "evaluation", "alias", "alias", "removal",
    ]  # fmt: skip
    assert [change["what"] for change in some.changes] == [
        "moved bird@prod from nothing to 1", "tagged bird@1: good", "removed bird@prod, which pointed to 1",
    ]  # fmt: skip


def test_a_command_reads_the_body_and_what_fails_is_kept(registry: Registry, tmp_path: Path) -> None:
    """It runs in the home with event and id in its environment; one that fails is recorded with what it said."""
    line = "cat > body.json; echo $QHUB_EVENT $QHUB_DELIVERY > named"
    add_hook(registry, Hook("note", command=("sh", "-c", line)))
    add_hook(registry, Hook("bad", command=("sh", "-c", "echo no >&2; exit 3")))
    add_hook(registry, Hook("long", command=("sh", "-c", "sleep 60 & sleep 60"), timeout=0.2))
    add_hook(registry, Hook("gone", command=("no-such-program",)))
    registry.set_alias("a", "prod", 1)
    assert settled(registry, "note").waiting == {}
    body = json.loads((registry.home.root / "body.json").read_bytes())
    assert body["change"]["what"] == "moved a@prod from nothing to 1"
    assert (registry.home.root / "named").read_text() == f"alias {body['delivery']}\n"
    for name, said in {"bad": "it ended with 3: no", "long": "it did not end within 0.2 s",
                       "gone": "no-such-program: No such file or directory"}.items():  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while not (entries := read_log(registry.home, name, 1)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (entries[0]["state"], entries[0]["said"]) == ("failed", said)
        remove_hook(registry, name)


def test_a_redirect_and_a_slow_drip_are_failures(registry: Registry, receiver: Any) -> None:
    """A signed body is not sent elsewhere, and a receiver that sends a byte now and then holds up one try only."""
    import socket

    elsewhere = receiver(lambda number: 307 if number == 1 else 200)
    add_hook(registry, Hook("moved", url=elsewhere.url))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                try:
                    for byte in b"HTTP/1.1 200 OK and so on, and on, and on":
                        connection.sendall(bytes([byte]))
                        time.sleep(0.1)
                except OSError:
                    pass

        threading.Thread(target=drip, daemon=True).start()
        add_hook(registry, Hook("drip", url=f"http://127.0.0.1:{server.getsockname()[1]}/", timeout=0.5))
        registry.set_alias("a", "prod", 1)
        settled(registry, "moved")
        deadline = time.monotonic() + PATIENCE
        while not (entries := read_log(registry.home, "drip", 9)) and time.monotonic() < deadline:
            time.sleep(0.05)
    remove_hook(registry, "drip")
    assert entries[-1]["said"] == "no answer within 0.5 s"
    assert [entry["said"] for entry in reversed(read_log(registry.home, "moved", 9))] == ["HTTP 307", "HTTP 200"]


WORK = """
import os, sys
from adapterhub_local.registry import Registry
registry = Registry(sys.argv[1])
while True:
    version = registry.publish("k", {"f": os.urandom(50)}, {})
    print(version, flush=True)
    registry.set_alias("k", "prod", version.number)
    print("alias", version.number, flush=True)
"""


def test_a_crash_between_a_change_and_its_hook_loses_nothing(registry: Registry, receiver: Any) -> None:
    """Processes killed at random moments, and those that tell the hook as well: each change that was committed reaches
    it at least once, and again only under the same id."""
    ci = receiver()
    add_hook(registry, Hook("ci", url=ci.url))
    rng, said = random.Random(7), []
    for _ in range(6):
        worker = subprocess.Popen(
            [sys.executable, "-c", WORK, str(registry.home.root)], stdout=subprocess.PIPE, text=True,
            env=environment_in(registry.home),
        )  # fmt: skip
        assert worker.stdout is not None
        first = worker.stdout.readline()
        teller = subprocess.Popen(
            [sys.executable, "-m", "adapterhub_local", "hook", "deliver", "--quiet"], env=environment_in(registry.home)
        )
        time.sleep(rng.uniform(0, 0.3))
        for one in (worker, teller):
            one.send_signal(signal.SIGKILL)
        said += [line for line in (first, *worker.stdout.readlines()) if line.endswith("\n")]
        worker.wait()
        teller.wait()
        worker.stdout.close()
    settled(registry, "ci")
    committed = {entry["id"]: entry["what"] for entry in history(registry, name="k", limit=1000).entries}
    told: dict[int, set[str]] = {}
    for headers, body in ci.got:
        told.setdefault(json.loads(body)["change"]["id"], set()).add(headers["x-qhub-delivery"])
    assert told.keys() == committed.keys()
    assert all(len(ids) == 1 for ids in told.values())
    assert len({next(iter(ids)) for ids in told.values()}) == len(told)
    assert len(said) >= 6
    assert len([line for line in said if line.startswith("k@")]) <= len(registry.versions("k"))


def test_after_a_rebuild_nothing_is_told_twice(registry: Registry, receiver: Any) -> None:
    """Numbers of changes survive the database, so a hook goes on where it was."""
    ci = receiver()
    add_hook(registry, Hook("ci", url=ci.url))
    registry.publish("a", files(1), LINEAGE)
    settled(registry, "ci")
    registry.database.close()
    for path in registry.home.root.glob("registry.db*"):
        path.unlink()
    rebuild(Registry(registry.home))
    again = Registry(registry.home)
    again.publish("a", files(2), LINEAGE)
    settled(again, "ci")
    assert [change["reference"] for change in ci.changes] == ["a@2", "a@3"]


def test_what_was_given_up_is_told_again_when_asked(registry: Registry, receiver: Any, tmp_path: Path) -> None:
    """`hook list` counts it, `hook deliver --failed` tries it again."""
    from adapterhub_local.registry.hooks.state import Waiting, write_state

    ci = receiver()
    add_hook(registry, Hook("ci", url=ci.url))
    write_state(registry.home, "ci", State(1, {}, {1: Waiting(8, 0.0, "HTTP 500")}))
    env = environment_in(registry.home)
    qhub = [sys.executable, "-m", "adapterhub_local", "hook"]
    listed = subprocess.run([*qhub, "list", "--json"], env=env, capture_output=True, text=True, check=True)
    assert (json.loads(listed.stdout)[0]["failed"], json.loads(listed.stdout)[0]["waiting"]) == (1, 0)
    refused = subprocess.run([*qhub, "deliver"], env=env, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "1 changes were given up (HTTP 500): `qhub hook deliver --failed`" in refused.stderr
    subprocess.run([*qhub, "deliver", "--failed"], env=env, capture_output=True, check=True)
    assert [change["reference"] for change in ci.changes] == ["a@1"]


def test_a_command_in_a_file_that_others_may_write_is_not_run(registry: Registry) -> None:
    """Who may write a shared home's config is not to run programs as somebody else: the change waits."""
    add_hook(registry, Hook("note", command=("touch", "ran")))
    registry.home.config.chmod(0o664)
    registry.set_alias("a", "prod", 1)
    settled(registry, "note")
    assert not (registry.home.root / "ran").exists()
    registry.home.config.chmod(0o644)
    settled(registry, "note")
    assert (registry.home.root / "ran").exists()


HAND = """# ours
max_bytes = "1GB"  # a small disk

[[hooks]]
name = "one"  # by hand
url = "http://127.0.0.1:9/"
events = [
  "alias",
]
"""


def test_an_edit_keeps_what_a_person_wrote(registry: Registry) -> None:
    """Adding and taking out leaves comments and spaces as they were; hooks read back as they were added."""
    registry.home.config.write_text(HAND)
    hook = add_hook(registry, Hook("two", command=("sh", "-c", 'echo "ü\\n"\x7f')))
    assert registry.home.config.read_text().startswith(HAND)
    assert read_config(registry.home).hooks[1] == hook
    with pytest.raises(InUse, match="there is a hook 'two' already"):
        add_hook(registry, hook)
    remove_hook(registry, "one")
    assert registry.home.config.read_text().startswith(HAND[: HAND.index("[[hooks]]")])
    assert [one.name for one in read_config(registry.home).hooks] == ["two"]
    with pytest.raises(NotFound, match="there is no hook 'one': there is two"):
        remove_hook(registry, "one")


def test_what_cannot_be_edited_is_left_alone(registry: Registry) -> None:
    """Hooks in an inline list are read, and refused to be cut, with the file as it was."""
    text = 'hooks = [{name = "one", url = "http://x/"}]\n'
    registry.home.config.write_text(text)
    assert read_config(registry.home).hooks == (Hook("one", url="http://x/"),)
    with pytest.raises(InputError, match="change it by hand"):
        remove_hook(registry, "one")
    assert registry.home.config.read_text() == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_byte = 5", "no key 'max_byte': did you mean max_bytes"),
        ("max_bytes = 'much'", "max_bytes: 'much' is not a size"),
        ("max_bytes = true", "max_bytes is a size"),
        ("x", "is not TOML"),
        ("hooks = 3", "hooks are tables"),
        ("[[hooks]]\nname='a'", "a url or a command, and not both"),
        ("[[hooks]]\nname='a'\nurl='http://x'\ncommand=['y']", "a url or a command, and not both"),
        ("[[hooks]]\nurl='http://x'", "name is lower-case"),
        ("[[hooks]]\nname='../a'\nurl='http://x'", "name is lower-case"),
        ("[[hooks]]\nname='a'\nurl='ftp://x'", "url is an address"),
        ("[[hooks]]\nname='a'\nurl='http://u:p@x'", "a user or a password"),
        ("[[hooks]]\nname='a'\nurl='http://[x'", "url is an address"),
        ("[[hooks]]\nname='a'\ncommand='x'", "command is a list of texts"),
        ("[[hooks]]\nname='a'\nurl='http://x'\nevents=['moved']", "there is no event 'moved'"),
        ("[[hooks]]\nname='a'\nurl='http://x'\nevents=[]", "events is empty"),
        ("[[hooks]]\nname='a'\nurl='http://x'\ntimeout=0", "timeout is seconds"),
        ("[[hooks]]\nname='a'\nurl='http://x'\ntimeout=nan", "timeout is seconds"),
        ("[[hooks]]\nname='a'\nurl='http://x'\nsecret='x'", "no key 'secret': did you mean secret_file"),
        ("[[hooks]]\nname='a'\nurl='http://x'\n[[hooks]]\nname='a'\nurl='http://y'", "two hooks are called 'a'"),
    ],
)
def test_mistakes_in_the_config_are_named(text: str, said: str) -> None:
    """Each with its file and key; nothing is guessed."""
    with pytest.raises(InputError, match=f"home/config.toml.*{said}"):
        parse_config(text, "home/config.toml")


def test_a_config_that_cannot_be_read_holds_up_no_move(registry: Registry) -> None:
    """A hook that cannot be found is not told, and the alias moves; a publish, whose limit nobody knows, is refused."""
    registry.home.config.write_text("hooks = 3")
    registry.set_alias("a", "prod", 1)
    with pytest.raises(InputError, match=r"config\.toml: hooks are tables"):
        registry.publish("a", files(1), LINEAGE)
    assert [str(version) for version in registry.versions()] == ["a@1"]
