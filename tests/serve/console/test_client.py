"""Verbs that QHUB_SERVER sends to a server: they print and do there what they print and do on its machine."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapterhub_local.cli.main import EITHER, THERE, VERBS, run
from adapterhub_local.errors import RemoteError
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.registry.graph import tree_of
from tests.serve.console.conftest import Console, fill, read_record

Said = tuple[int, str, str]
Call = Callable[..., Said]
READING = (
    "list", "list sentiment", "list sentiment --json", "list --metric exact_match>0.6", "list --sort exact_match",
    "list --base tiny --task origin", "list --tag candidate", "list --limit 1", "list --json",
    "search feelings", "search sentiment --json", "search nothing-has-this",
    "show sentiment", "show sentiment@1 --json", "show both", "show both@1 --json",
    "lineage both", "lineage both --mermaid", "lineage both --dot", "lineage both --json", "lineage sentiment@2",
    "alias list sentiment", "alias list sentiment --json", "alias list tone", "alias show sentiment prod",
    "alias show sentiment prod --json", "alias log sentiment", "alias log sentiment prod --json",
    "alias split sentiment", "alias split sentiment --json",
    "tag both", "tag both --json", "history", "history --limit 2 --json", "history both --event version",
    "runs list", "runs list --json", "base list", "base show tiny",
    "diff sentiment@1 sentiment@2", "diff sentiment@1 sentiment@2 --json", "diff sentiment@2 sentiment@2",
)  # fmt: skip
WRONG = (
    "list nobody", "list --metric nonsense", "list --sort nothing", "show nobody", "show sentiment@9", "show @",
    "lineage nobody",
    "alias list nobody", "alias show sentiment none", "alias set sentiment prod 99", "alias set nobody prod 1",
    "alias set sentiment prod 1 --expect 7", "alias rollback sentiment none", "alias rm sentiment none",
    "alias split sentiment prod=1,prod=2", "alias split sentiment none=1", "alias protect sentiment prod",
    "alias protect sentiment prod --require nonsense", "alias unprotect sentiment prod",
    "tag nobody x", "tag both --remove",
    "describe nobody text", "approve nobody --for prod", "approve both --for prod --withdraw", "runs show nothing",
    "history nobody", "history --after nonsense", "diff sentiment nobody",
)  # fmt: skip
CHANGING = (
    "alias set sentiment canary 2", "alias set sentiment prod 2 --expect 1", "alias set sentiment fresh 1 --expect 0",
    "alias split sentiment canary=10,prod=90", "alias split sentiment", "alias split sentiment --off --json",
    "alias rollback sentiment prod", "alias rm sentiment canary --expect 2",
    "alias protect sentiment prod --require sentiment.exact_match>=0.8 --approvals 1",
    "alias protect sentiment held --require other.loss<=1", "approve sentiment@2 --for prod --json",
    "alias list sentiment",
    "alias unprotect sentiment held", "alias set sentiment held 2", "tag both good new",
    "tag both --remove good --json", "describe both all-of-it",
)  # fmt: skip


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """`qhub` in this process, in a home, and with a server where one is named."""

    def said(command: str, home: Path, server: str | None = None) -> Said:
        monkeypatch.setenv("QHUB_HOME", str(home))
        monkeypatch.setenv("QHUB_ACTOR", "ann")
        if server is None:
            monkeypatch.delenv("QHUB_SERVER", raising=False)
        else:
            monkeypatch.setenv("QHUB_SERVER", server)
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            run(command.split(" "))
        return int(left.value.code or 0), *capfd.readouterr()

    return said


@pytest.mark.parametrize("command", READING)
def test_prints_what_that_machine_prints(command: str, console: Console, call: Call, tmp_path: Path) -> None:
    """Tables and JSON of every verb that reads; nothing is made in the home of this machine."""
    here = call(command, console.registry.home.root)
    there = call(command, tmp_path / "none", console.url)
    assert there[0] == here[0] == 0
    if "--json" in command and command.split()[0] in ("list", "search"):  # less of lineage, but the same of what it has
        theirs, ours = (sorted(json.loads(said[1]), key=lambda one: one["reference"]) for said in (there, here))
        assert [set(each) for each in theirs] == [set(each) for each in ours]
        for their, our in zip(theirs, ours, strict=True):
            assert {key: their[key] for key in their if key not in ("base", "adapter")} == {
                key: our[key] for key in our if key not in ("base", "adapter")
            }
            assert their["adapter"].items() <= our["adapter"].items()
    else:
        assert _of_everywhere(there[1]) == _of_everywhere(here[1])
        assert there[2] == here[2]
    assert not (tmp_path / "none").exists()


def _of_everywhere(text: str) -> list[str]:
    """What is printed, but for where a base lies and came from, which only its machine says."""
    return [line.rstrip() for line in text.splitlines() if not line.strip().startswith(("source", "folder", "───"))]


@pytest.mark.parametrize("command", WRONG)
def test_refuses_as_that_machine_does(command: str, console: Console, call: Call, tmp_path: Path) -> None:
    """The same sentence and exit code; nothing has changed."""
    before = call("history --json", console.registry.home.root)
    here = call(command, console.registry.home.root)
    there = call(command, tmp_path / "none", console.url)
    assert here[0] == 2
    assert there == here
    assert call("history --json", console.registry.home.root) == before


def test_changes_what_that_machine_changes(built_base: Path, call: Call, tmp_path: Path) -> None:
    """The same commands in two equal homes, one of them behind a server, print the same and leave the same history."""
    registries = [Registry(tmp_path / side) for side in ("near", "far")]
    for registry in registries:
        fill(registry, read_record(built_base))
    running = Console(registries[1])
    try:
        for command in CHANGING:
            here, there = call(command, registries[0].home.root), call(command, tmp_path / "none", running.url)
            assert _timeless(there) == _timeless(here), command
            assert here[0] == 0, (command, here)
    finally:
        running.stop()
    histories = [json.loads(call("history --json --limit 100", registry.home.root)[1]) for registry in registries]
    # a version's digest has the time at which it was made in it
    told = [
        [(one["event"], one["what"].partition(" (sha256")[0]) for one in history["changes"]] for history in histories
    ]
    assert told[0] == told[1]


def _timeless(said: Said) -> tuple[Any, ...]:
    """Without times: all that two machines say differently of one command."""
    try:
        parsed = json.loads(said[1])
    except ValueError:
        return said
    for approval in parsed.get("approvals", ()) if isinstance(parsed, dict) else ():
        approval["at"] = approval["actor"] = approval["manifest"] = None
    return said[0], parsed, said[2]


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in (*THERE, *EITHER)])
def test_other_verbs_are_refused(verb: str, call: Call, tmp_path: Path) -> None:
    """What would work on this machine while another is meant does nothing, and says how to have it work here."""
    code, out, err = call(verb, tmp_path / "none", "http://127.0.0.1:1")
    assert (code, out) == (2, "")
    assert f"QHUB_SERVER is set, and `qhub {verb}` works on this machine alone: QHUB_SERVER= qhub {verb}" in err


@pytest.mark.parametrize("command", ["base add x y", "base rm tiny", "base path tiny", "runs rm x"])
def test_parts_of_verbs_are_refused(command: str, console: Console, call: Call, tmp_path: Path) -> None:
    """As are those of a verb that goes there."""
    code, _, err = call(command, tmp_path / "none", console.url)
    assert code == 2
    assert "works on this machine alone" in err


@pytest.mark.parametrize("option", ["--like x.jsonl", "--similar-to sentiment"])
def test_ranking_is_refused(option: str, console: Console, call: Call, tmp_path: Path) -> None:
    """A search that would compute."""
    code, _, err = call(f"search {option}", tmp_path / "none", console.url)
    assert code == 2
    assert "on this machine alone" in err


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """Something that answers every request alike, and is not one of our servers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "code", "reason"),
    [
        (404, b"<html>not here</html>", 2, "status 404 Not Found: is it a server of this project?"),
        (502, b"bad gateway", 1, "status 502"),
        (200, b"<html>welcome</html>", 1, "answers with something that is not JSON"),
        (401, b"{}", 2, "set QHUB_API_KEY to a key of it"),
        (500, b'{"error": {"message": "the disk is full"}}', 1, "the disk is full"),
    ],
)
def test_something_else_answers(status: int, body: bytes, code: int, reason: str, call: Call, tmp_path: Path) -> None:
    """A page, a proxy or a broken server: one sentence, which says what answered."""
    with answering(status, body) as url:
        got, out, err = call("history", tmp_path / "none", url)
    assert (got, out) == (code, "")
    assert reason in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("url", ["gpu-box:8000", "ftp://gpu-box", "http://", "http://host:notaport", "http://host:0"])
def test_not_an_address(url: str, call: Call, tmp_path: Path) -> None:
    """Bad input, with what an address looks like."""
    code, _, err = call("list", tmp_path / "none", url)
    assert code == 2
    assert "is not a server's address: write it as http://127.0.0.1:8000" in err


def test_nobody_answers(call: Call, tmp_path: Path) -> None:
    """A failure, not bad input."""
    code, _, err = call("list", tmp_path / "none", "http://127.0.0.1:9")
    assert code == 1
    assert "http://127.0.0.1:9 (QHUB_SERVER) does not answer" in err


@pytest.mark.parametrize("url", ["http://host with space", "http://a..b", "http://" + "x" * 300])
@pytest.mark.parametrize("command", ["list", "chat"])
def test_no_host_has_such_a_name(command: str, url: str, call: Call, tmp_path: Path) -> None:
    """What cannot be looked up is bad input, for every verb that goes there."""
    code, _, err = call(command, tmp_path / "none", url)
    assert code == 2
    assert "is not a server's address" in err


@pytest.mark.parametrize("key", ["cl\u00e9", "a\nb", "a b", "\x1b[31m"])
@pytest.mark.parametrize("command", ["list", "chat"])
def test_not_a_key(
    command: str, key: str, console: Console, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that no header can hold, as an editor or a copied line leaves it."""
    monkeypatch.setenv("QHUB_API_KEY", key)
    code, out, err = call(command, tmp_path / "none", console.url)
    assert (code, out) == (2, "")
    assert "QHUB_API_KEY is not a key" in err


@pytest.mark.parametrize(
    "command",
    [
        "show ../../keys", "show a/../../keys", "show ..", "lineage ../history", "alias list ..", "alias set .. prod 1",
        "alias rm ../adapters prod", "tag ../../keys x", "describe .. x", "alias split ../x", "list ../../keys",
    ],
)  # fmt: skip
def test_a_name_leads_to_no_other_endpoint(command: str, console: Console, call: Call, tmp_path: Path) -> None:
    """Names with dots between slashes are refused before anything is sent, as this machine refuses them."""
    code, out, err = call(command, tmp_path / "none", console.url)
    assert (code, out) == (2, "")
    assert "is not a name" in err
    assert call(command, console.registry.home.root)[0] == 2


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_address_as_people_write_it(end: str, console: Console, call: Call, tmp_path: Path) -> None:
    """With a slash or with the path that clients of OpenAI are given; `chat` reads it alike, and finds no model."""
    assert call("list", tmp_path / "none", console.url + end)[0] == 0
    assert "/v1/models" in call("chat", tmp_path / "none", console.url + end)[2]


def test_keys_decide(built_base: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, a wrong one, one that may read only, and one that may change; the key is the actor."""
    registry = Registry(tmp_path / "far")
    fill(registry, read_record(built_base))
    keys = Keys(registry.home)
    _, reader = keys.create(adapters=("sentiment",))
    boss, admin = keys.create(scopes=("admin",))
    running = Console(registry)
    try:
        assert "set QHUB_API_KEY to a key of it" in call("list", tmp_path / "none", running.url)[2]
        monkeypatch.setenv("QHUB_API_KEY", "qh-wrong")
        assert "it does not know the key in QHUB_API_KEY" in call("list", tmp_path / "none", running.url)[2]
        monkeypatch.setenv("QHUB_API_KEY", reader)
        assert "origin" not in call("list", tmp_path / "none", running.url)[1]
        code, _, err = call("alias set sentiment prod 2", tmp_path / "none", running.url)
        assert code == 2
        assert "admin" in err
        monkeypatch.setenv("QHUB_API_KEY", admin)
        assert call("alias set sentiment prod 2", tmp_path / "none", running.url)[0] == 0
        moves = json.loads(call("alias log sentiment prod --json", tmp_path / "none", running.url)[1])
        assert boss.id in moves[-1]["actor"]
    finally:
        running.stop()


NODE = {"id": "a", "label": "a", "detail": "", "reference": None}


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"nodes": [], "edges": []},
        {
            "nodes": [{"id": "a", "label": "a", "detail": "", "reference": None}],
            "edges": [{"from": "a", "to": "a", "weight": 1}],
        },
        {"nodes": [{"id": "a"}], "edges": []},
        {
            "nodes": [{"id": "a", "label": "a", "detail": "", "reference": None}],
            "edges": [{"from": "b", "to": "a", "weight": 1}],
        },
    ],
)
def test_not_a_lineage(found: dict[str, Any]) -> None:
    """A graph that leads to itself, or nowhere, is refused."""
    with pytest.raises(RemoteError):
        tree_of(found)
