"""A server beside what else happens to a home: its own sudden death, and the collection of what nobody needs."""

import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import httpx
import pytest

from adapterhub_local.base.bases import find_base
from adapterhub_local.registry import Registry
from adapterhub_local.registry.fsck import fsck
from adapterhub_local.registry.gc import collect, remove
from adapterhub_local.settings import home as home_at
from tests.serve.adapter_makers import publish
from tests.serve.attacks.attacked import AttackedServer

CHAT = {"model": "alpha", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200, "temperature": 0}


def children(process: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False)
    own = [int(line) for line in found.stdout.split()]
    return own + [further for child in own for further in children(child)]


@pytest.mark.skipif(shutil.which("ps") is None, reason="there is no ps")
def test_a_server_that_was_killed(attacked_home: Path, tmp_path: Path) -> None:
    """After SIGKILL in the middle of answers its processes are gone, the home is sound, and the next one is ready."""
    home = tmp_path / "home"
    shutil.copytree(attacked_home, home, symlinks=True)
    first = AttackedServer(home)
    try:
        assert first.http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1}).status_code == 200
        started = children(first.process.pid)  # before the answer begins: `ps` can take as long as all of it
        body = {**CHAT, "ignore_eos": True, "stream": True}
        with first.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            parts = answer.iter_bytes()
            next(parts)
            first.process.send_signal(signal.SIGKILL)
            with pytest.raises(httpx.HTTPError):
                for _ in parts:
                    pass
    finally:
        first.process.kill()
        first.stop()
    assert started, "chat templates run in a process of their own"

    second = AttackedServer(home, "--port", str(first.port))  # nothing holds the port
    try:
        assert second.http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1}).status_code == 200
        report = fsck(Registry(home))
        assert not report.problems
        assert not list(home.glob("tmp/*"))
        for process in started:
            with pytest.raises(ProcessLookupError):
                os.kill(process, 0)
    finally:
        assert second.stop() == 0


def test_collection_beside_a_server(attacked: AttackedServer, attacked_home: Path) -> None:
    """While unneeded blobs are collected again and again, no request for a new version fails; nor does an answer
    whose version is removed in the middle of it."""
    registry, done = Registry(attacked_home), threading.Event()
    base, rounds = find_base("tiny", home_at(attacked_home)), []

    def collect_all() -> None:
        own = Registry(attacked_home)
        while not done.is_set():
            rounds.append(collect(own, apply=True, grace=0, purge=0))

    collector = threading.Thread(target=collect_all)
    collector.start()
    try:
        for seed in range(6):
            version = publish(registry, "delta", base, seed=100 + seed)
            asked = {**CHAT, "model": str(version), "stream": True, "max_tokens": 60}
            with attacked.http.stream("POST", "/v1/chat/completions", json=asked) as answer:
                assert answer.status_code == 200, answer.read()
                lines = answer.iter_lines()
                next(lines)
                remove(registry, version, force=True)
                events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert not [event for event in events if "error" in event]
            gone = attacked.http.post("/v1/chat/completions", json={**CHAT, "model": str(version)})
            assert gone.status_code == 404
    finally:
        done.set()
        collector.join()
    assert len(rounds) > 1
    assert not fsck(registry).problems
