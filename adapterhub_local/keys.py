"""API keys of the server: stored as hashes in `keys.json`, for their owner alone; a revoked key stays on record.

qhub-3f9c21aa-<43 letters>      what the client sends: the id, then the secret, which is nowhere stored
"""

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from adapterhub_local.durable import replacing
from adapterhub_local.errors import Corrupt, InputError, NotFound
from adapterhub_local.settings import Home, make_folder

SCOPES = ("infer", "admin", "metrics")
PRIORITIES = ("low", "normal", "high")
PERIODS = {"s": 1, "min": 60, "h": 3600, "day": 86400}
MAX_RATE = 100_000
_RATE = re.compile(r"([0-9]{1,6})/(s|min|h|day)")
_AGE = re.compile(r"([0-9]{1,5})([hd])")
_ID = re.compile(r"[0-9a-f]{8}")
_HASH = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_TOKEN = re.compile(r"qhub-([0-9a-f]{8})-([A-Za-z0-9_-]{43})")
_PATTERN = re.compile(r"[a-z0-9._/*?\[\]!-]+")  # what a name may be made of, and what fnmatch reads
_NOBODY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class Key:
    """What a key allows. `adapters` are patterns of names (`sql*`), none for all; `rate` is such as 60/min.

    `priority`, one of PRIORITIES: whose requests go first where requests wait.
    """

    id: str
    digest: str  # sha256 of the secret, which has 256 random bits: nothing slower is needed
    scopes: tuple[str, ...]
    created_at: str
    note: str | None = None
    adapters: tuple[str, ...] = ()
    rate: str | None = None
    concurrency: int | None = None
    expires_at: str | None = None
    revoked_at: str | None = None
    priority: str = "normal"

    def to_json(self) -> dict[str, Any]:
        """All that may be shown of it: nothing that is made of its secret."""
        entry = asdict(self)
        del entry["digest"]
        return entry | {"is_valid": self.is_valid()}

    def allows(self, name: str) -> bool:
        """Whether an adapter, or the base, of this name may be asked."""
        return not self.adapters or any(fnmatchcase(name, pattern) for pattern in self.adapters)

    def is_valid(self) -> bool:
        """Neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > _now())

    @property
    def window(self) -> tuple[int, int] | None:
        """Requests, and the seconds in which no more than these may come."""
        return parse_rate(self.rate) if self.rate is not None else None


def parse_rate(text: str) -> tuple[int, int]:
    """`60/min` as (60, 60): requests and seconds. Raises InputError."""
    match = _RATE.fullmatch(text)
    if match is None or not 1 <= int(match[1]) <= MAX_RATE:
        raise InputError(f"'{text}' is not a rate: write a number and {', '.join(PERIODS)}, such as 60/min")
    return int(match[1]), PERIODS[match[2]]


class Keys:
    """The keys of one home. Safe to use from several processes; a change counts at once in all of them."""

    def __init__(self, home: Home) -> None:
        self.path = home.keys
        self._stamp: tuple[int, int, int] | None = None
        self._known: dict[str, Key] = {}

    def all(self) -> list[Key]:
        """Every key there ever was, oldest first. Raises Corrupt if the file cannot be read."""
        try:
            state = self.path.stat()
        except FileNotFoundError:
            self._known, self._stamp = {}, None
            return []
        stamp = (state.st_mtime_ns, state.st_size, state.st_ino)
        if stamp != self._stamp:
            self._known, self._stamp = _read(self.path), stamp
        return list(self._known.values())

    def find(self, token: str) -> Key | None:
        """The valid key that a client sent, compared in constant time; None if it is none."""
        self.all()
        match = _TOKEN.fullmatch(token)
        key = self._known.get(match[1]) if match else None
        digest = hashlib.sha256((match[2] if match else "").encode()).hexdigest()
        # an unknown id takes as long as a wrong secret
        is_same = hmac.compare_digest(digest, key.digest if key else _NOBODY)
        return key if key is not None and is_same and key.is_valid() else None

    def create(
        self,
        *,
        scopes: tuple[str, ...] = ("infer",),
        adapters: tuple[str, ...] = (),
        rate: str | None = None,
        concurrency: int | None = None,
        expires: str | None = None,
        note: str | None = None,
        priority: str = "normal",
    ) -> tuple[Key, str]:
        """A new key and the token to send, which cannot be shown again. Raises InputError."""
        _check(scopes, adapters, rate, concurrency, priority)
        secret = secrets.token_urlsafe(32)
        with self._changing() as keys:
            identity = secrets.token_hex(4)
            while identity in keys:
                identity = secrets.token_hex(4)
            digest = hashlib.sha256(secret.encode()).hexdigest()
            limits = (adapters, rate, concurrency, _expiry(expires))
            key = Key(identity, digest, tuple(dict.fromkeys(scopes)), _now(), note, *limits, priority=priority)
            keys[identity] = key
        return key, f"qhub-{identity}-{secret}"

    def revoke(self, identity: str) -> Key:
        """Refuse a key from now on. Raises NotFound."""
        with self._changing() as keys:
            if identity not in keys:
                raise NotFound(f"there is no key '{identity}': `qhub key list` shows them")
            keys[identity] = replace(keys[identity], revoked_at=keys[identity].revoked_at or _now())
        return keys[identity]

    def take(self, keys: Iterable[Key], revoked: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """Take in keys that were made elsewhere, and revoke those that were revoked there: id -> when.

        Returns the ids that changed here, and those that are other keys here, which stay as they are. What was revoked
        here stays so. Nothing is written if nothing changes.
        """

        def merge(known: dict[str, Key]) -> tuple[dict[str, Key], list[str]]:
            changes, others = {}, []
            for key in keys:
                own = known.get(key.id)
                if own is not None and own.digest != key.digest:
                    others.append(key.id)
                elif own is None or key.revoked_at is not None:
                    base = own or key
                    at = base.revoked_at or key.revoked_at or revoked.get(key.id)
                    changes[key.id] = replace(base, revoked_at=at)
            for identity, at in revoked.items():
                own = changes.get(identity) or known.get(identity)
                if own is not None and own.revoked_at is None and identity not in others:
                    changes[identity] = replace(own, revoked_at=at)
            return {identity: key for identity, key in changes.items() if known.get(identity) != key}, others

        keys = list(keys)
        changes, others = merge({key.id: key for key in self.all()})
        if changes:
            with self._changing() as known:
                changes, others = merge(known)
                known.update(changes)
        return sorted(changes), others

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Key]]:
        """The keys by id; what the block does to them is written when it ends, whole or not at all."""
        make_folder(self.path.parent)
        # the lock's file is never replaced, the keys' file is
        with open(os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT, 0o600), "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = _read(self.path) if self.path.exists() else {}
            yield keys
            text = json.dumps({"keys": [asdict(key) for key in keys.values()]}, indent=2)
            with replacing(self.path, 0o600) as staged:
                staged.write_text(text, encoding="utf-8")


def key_of(entry: Any) -> Key:
    """The key that was made elsewhere and is described by this JSON. Raises ValueError, TypeError, KeyError,
    InputError for what cannot be one."""
    key = Key(**{**entry, "scopes": tuple(entry["scopes"]), "adapters": tuple(entry["adapters"])})
    texts = (key.created_at, *(text for text in (key.note, key.expires_at, key.revoked_at) if text is not None))
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise ValueError("a note or a time of it is not a line of text")
    if not _ID.fullmatch(key.id) or not _HASH.fullmatch(key.digest):
        raise ValueError("its id or its hash is not one")
    if any(not _TIME.fullmatch(at) for at in (key.created_at, key.expires_at, key.revoked_at) if at is not None):
        raise ValueError("a time of it is not one")  # times are compared as texts
    _check(key.scopes, key.adapters, key.rate, key.concurrency, key.priority)
    return key


def _check(
    scopes: tuple[str, ...], adapters: tuple[str, ...], rate: str | None, concurrency: int | None, priority: str
) -> None:
    """Raise InputError unless a key may have these."""
    if not scopes or not set(scopes) <= set(SCOPES):
        raise InputError(f"a key has scopes from {', '.join(SCOPES)}")
    if priority not in PRIORITIES:
        raise InputError(f"'{priority}' is not a priority: it is {', '.join(PRIORITIES[:-1])} or {PRIORITIES[-1]}")
    if rate is not None:
        parse_rate(rate)
    if concurrency is not None and (type(concurrency) is not int or concurrency < 1):
        raise InputError("concurrency is the number of requests at once: at least 1")
    if bad := next((one for one in adapters if not _PATTERN.fullmatch(one) or ".." in one), None):
        raise InputError(f"{bad!r} fits no name: an adapter pattern is a name, or part of one with *: sql*")


def _read(path: Path) -> dict[str, Key]:
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["keys"]
        keys = [
            Key(**{**entry, "scopes": tuple(entry["scopes"]), "adapters": tuple(entry["adapters"])})
            for entry in entries
        ]
        if strange := [key.priority for key in keys if key.priority not in PRIORITIES]:
            raise ValueError(strange[0])
    except (OSError, ValueError, KeyError, TypeError) as error:
        # no key is better than any key: nobody gets in until it is mended
        raise Corrupt(
            f"{path} cannot be read ({type(error).__name__}): fix it, or remove it and make new keys"
        ) from None
    return {key.id: key for key in keys}


def _expiry(age: str | None) -> str | None:
    if age is None:
        return None
    match = _AGE.fullmatch(age)
    if match is None or not int(match[1]):
        raise InputError(f"'{age}' is not a time: write hours or days, such as 12h or 30d")
    return _now(timedelta(hours=int(match[1])) if match[2] == "h" else timedelta(days=int(match[1])))


def _now(after: timedelta = timedelta()) -> str:
    return (datetime.now(UTC) + after).isoformat(timespec="seconds").replace("+00:00", "Z")
