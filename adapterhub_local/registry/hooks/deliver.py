"""Notify a hook of what it does not know yet: change by change, after ever longer waits, until it accepts them.

One process does so for a hook at a time, and one more waits, for what is committed while the first looks for the last
time. A change is struck off after the hook took it, so after a crash in between it is sent again, under the same id.
"""

import fcntl
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapterhub_local.digests import hex_of
from adapterhub_local.durable import canonical_json, create_shared, digest_bytes
from adapterhub_local.registry.config import Hook
from adapterhub_local.registry.history import entry
from adapterhub_local.registry.hooks.attempt import Failed, attempt
from adapterhub_local.registry.hooks.state import State, Waiting, log, newest, read_state, start, write_state
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.rows import now
from adapterhub_local.settings import make_folder

MAX_ATTEMPTS = 8  # in about two minutes; `qhub hook deliver --failed` tries again what was given up
MAX_WAIT = 60.0
LOOK_SECONDS = 0.5  # how often the journal is looked at while something waits


def deliver(registry: Registry, hook: Hook, *, retry_failed: bool = False) -> State | None:
    """Tell a hook all it wants, and return what is left then; None if another process does so already.

    A command runs only for the user to whom the config belongs: who may write a shared home is not to run programs as
    somebody else.
    """
    home = registry.home
    make_folder(home.hooks)
    with _in_turn(home.hooks / f"{hook.name}.lock") as is_ours:
        if not is_ours:
            return None
        state = read_state(home, hook.name) or start(registry)
        if retry_failed:
            state.waiting |= {number: Waiting(error=one.error) for number, one in state.failed.items()}
            state.failed = {}
        if hook.command and not _is_own(home.config):
            return state
        while True:
            _look(registry, hook, state)
            write_state(home, hook.name, state)
            for number in [number for number, one in state.waiting.items() if one.next <= time.time()]:
                _try(registry, hook, state, number)
                write_state(home, hook.name, state)
            if not state.waiting:
                _look(registry, hook, state)
                if not state.waiting:
                    write_state(home, hook.name, state)
                    return state
                continue
            pause = min(one.next for one in state.waiting.values()) - time.time()
            time.sleep(max(0.0, min(pause, LOOK_SECONDS)))


def delivery_id(record: str) -> str:
    """What a hook knows a change by, however often it is sent: from the record itself, so a rebuild changes nothing."""
    return hex_of(digest_bytes(record.encode()))[:32]


def _look(registry: Registry, hook: Hook, state: State) -> None:
    """Take in what was committed since."""
    state.after = min(state.after, newest(registry))  # a journal that lost its end has numbers once more
    for row in registry.database.rows("SELECT id, record FROM marks WHERE id > ? ORDER BY id", (state.after,)):
        if hook.wants(json.loads(row["record"])):
            state.waiting[row["id"]] = Waiting()
        state.after = row["id"]


def _try(registry: Registry, hook: Hook, state: State, number: int) -> None:
    rows = registry.database.rows("SELECT id, record FROM marks WHERE id = ?", (number,))
    waiting = state.waiting[number]
    if not rows:
        del state.waiting[number]
        return
    headers, body = message(hook, rows[0]["id"], rows[0]["record"])
    waiting.attempts += 1
    began = time.monotonic()
    line: dict[str, Any] = {"change": number, "delivery": headers["X-Qhub-Delivery"], "attempt": waiting.attempts}
    try:
        line |= {"state": "delivered", "said": attempt(registry.home, hook, headers, body)}
        del state.waiting[number]
    except Failed as error:
        waiting.error = str(error)
        waiting.next = time.time() + min(MAX_WAIT, 2.0 ** (waiting.attempts - 1)) * random.uniform(0.75, 1)  # noqa: S311
        is_over = waiting.attempts >= MAX_ATTEMPTS
        if is_over:
            state.failed[number] = state.waiting.pop(number)
        line |= {"state": "given up" if is_over else "failed", "said": str(error)}
    log(registry.home, hook.name, {"at": now(), "ms": round((time.monotonic() - began) * 1000), **line})


def message(hook: Hook, number: int, record: str) -> tuple[dict[str, str], bytes]:
    """The headers and the body that notify a hook of a change."""
    change, delivery = entry(number, record), delivery_id(record)
    event = "publish" if change["event"] == "version" else change["event"]
    body = canonical_json({"hook": hook.name, "event": event, "delivery": delivery, "change": change})
    return {"X-Qhub-Event": event, "X-Qhub-Delivery": delivery}, body


@contextmanager
def _in_turn(path: Path) -> Iterator[bool]:
    """Hold the lock `path`, after whoever holds it; False at once if somebody waits for it already."""
    queue = path.with_suffix(".next")
    for one in (path, queue):
        create_shared(one)
    first, second = (os.open(one, os.O_RDONLY | os.O_CLOEXEC) for one in (queue, path))
    try:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        fcntl.flock(second, fcntl.LOCK_EX)
        fcntl.flock(first, fcntl.LOCK_UN)
        yield True
    finally:
        os.close(first)
        os.close(second)


def _is_own(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022
