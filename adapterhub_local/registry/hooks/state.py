"""What each hook was notified of: how far in the journal, what still has to be sent and when, and a log of attempts."""

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from adapterhub_local.durable import canonical_json, replacing, share_file
from adapterhub_local.registry.registry import Registry
from adapterhub_local.settings import Home, make_folder

MAX_LOG = 4 << 20  # bytes; then the log begins anew, and the one before is kept


@dataclass
class Waiting:
    """A change that a hook was not notified of yet; due again at `next` (seconds since 1970)."""

    attempts: int = 0
    next: float = 0.0
    error: str | None = None


@dataclass
class State:
    """All up to record `after` was looked at; of that, `waiting` still has to be sent, and `failed` was given up."""

    after: int
    waiting: dict[int, Waiting] = field(default_factory=dict)
    failed: dict[int, Waiting] = field(default_factory=dict)


def newest(registry: Registry) -> int:
    """The number of the newest record of the journal, 0 if there is none."""
    rows = registry.database.rows("SELECT max(id) AS id FROM marks")
    return (rows[0]["id"] or 0) if rows else 0


def start(registry: Registry) -> State:
    """The state of a hook that was notified of nothing: what happened before its config was written is not for it."""
    since = datetime.fromtimestamp(registry.home.config.stat().st_mtime, UTC).isoformat(timespec="microseconds")
    query = "SELECT max(id) AS id FROM marks WHERE json_extract(record, '$.at') < ?"
    rows = registry.database.rows(query, (since.replace("+00:00", "Z"),))
    return State((rows[0]["id"] or 0) if rows else 0)


def read_state(home: Home, name: str) -> State | None:
    """The state of a hook, None if it has none yet or it cannot be read."""
    try:
        fields = json.loads((home.hooks / f"{name}.json").read_bytes())
        parts = ({int(key): Waiting(**value) for key, value in fields[part].items()} for part in ("waiting", "failed"))
        return State(int(fields["after"]), *parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_state(home: Home, name: str, state: State) -> None:
    """Keep the state, in one step. For who holds the hook's lock."""
    make_folder(home.hooks)
    parts = {part: {str(key): asdict(value) for key, value in getattr(state, part).items()} for part in
             ("waiting", "failed")}  # fmt: skip
    path = home.hooks / f"{name}.json"
    with replacing(path) as staged:
        staged.write_bytes(canonical_json({"after": state.after, **parts}))
        share_file(staged)


def log(home: Home, name: str, entry: dict[str, Any]) -> None:
    """Append a try to the hook's log, by one write."""
    path = home.hooks / f"{name}.log"
    if path.exists() and path.stat().st_size > MAX_LOG:
        path.replace(home.hooks / f"{name}.log.1")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, canonical_json(entry) + b"\n")
    finally:
        os.close(descriptor)
    share_file(path)


def read_log(home: Home, name: str, limit: int) -> list[dict[str, Any]]:
    """The last tries, the newest first."""
    try:
        lines = (home.hooks / f"{name}.log").read_bytes().splitlines()
    except OSError:
        return []
    entries = []
    for line in reversed(lines):
        try:
            entries.append(json.loads(line))
        except ValueError:  # cut by a crash
            continue
        if len(entries) == limit:
            break
    return entries
