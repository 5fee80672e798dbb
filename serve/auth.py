"""Who may ask: keys, their scopes and adapters, and how often and how much at once each may ask."""

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from time import monotonic

from adapterhub_local.keys import Key, Keys
from serve.errors import Forbidden, Throttled, Unauthorized

OPEN_PATHS = frozenset(["/health", "/ready"])
ADMIN_PATHS = frozenset(["/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
COUNTED_PATHS = frozenset(["/v1/chat/completions", "/v1/completions", "/v1/responses"])


class Gate:
    """Decides on every request. Without a key in the home it is open, unless `is_required`."""

    def __init__(self, keys: Keys, *, is_required: bool = False) -> None:
        self.keys = keys
        self.is_required = is_required
        self._running: Counter[str] = Counter()
        self._times: defaultdict[str, deque[float]] = defaultdict(deque)  # of each key, when it asked lately
        self._lock = threading.Lock()

    def identify(self, path: str, authorization: str | None) -> Key | None:
        """The key of a request to `path`, None where none is needed. Raises Unauthorized, Forbidden."""
        if path in OPEN_PATHS or not (self.is_required or self.keys.all()):
            return None
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthorized("this server wants an API key: send the header 'Authorization: Bearer qhub-...'")
        key = self.keys.find(token.strip())
        if key is None:
            raise Unauthorized("this API key is unknown, revoked or expired: `qhub key create` makes one")
        if path in ADMIN_PATHS and "admin" not in key.scopes:
            raise Forbidden(f"{path} is for keys of scope admin")
        if path in COUNTED_PATHS and "infer" not in key.scopes:
            raise Forbidden(f"{path} is for keys of scope infer")
        return key

    def enter(self, path: str, key: Key | None) -> None:
        """Count a request in; `leave` counts it out. Raises Throttled."""
        if key is None or path not in COUNTED_PATHS:
            return
        with self._lock:
            if key.concurrency is not None and self._running[key.id] >= key.concurrency:
                raise Throttled(f"this key may run {key.concurrency} requests at once, and does", 1)
            if key.window is not None:
                self._count(key.id, *key.window, rate=key.rate or "")
            self._running[key.id] += 1

    def leave(self, path: str, key: Key | None) -> None:
        """Count out what `enter` counted in."""
        if key is None or path not in COUNTED_PATHS:
            return
        with self._lock:
            self._running[key.id] -= 1
            if not self._running[key.id]:
                del self._running[key.id]

    def _count(self, identity: str, limit: int, seconds: int, *, rate: str) -> None:
        now = monotonic()
        times = self._times[identity]
        while times and times[0] <= now - seconds:
            times.popleft()
        if len(times) >= limit:
            raise Throttled(f"this key may ask {rate}: try again later", times[0] + seconds - now)
        times.append(now)


def check_models(key: Key | None, names: Iterable[str]) -> None:
    """Raise Forbidden unless the key may ask all of these names, whether they exist or not."""
    for name in names if key is not None else ():
        if not key.allows(name):  # type: ignore[union-attr]
            raise Forbidden(f"this key is not for '{name}'")
