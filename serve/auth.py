"""Who may ask: keys, their scopes and adapters, and how often and how much at once each may ask."""

import contextlib
from collections.abc import Callable, Iterable

from adapterhub_local.errors import Corrupt
from adapterhub_local.keys import Key, Keys
from serve.access import Access, Scope
from serve.errors import Forbidden, Throttled, Unauthorized
from serve.limits import Bounds, Lease, Limits, LocalLimits, Refusal, Why

REFUSED = frozenset([400, 403, 404, 429])  # statuses of requests that did not run


class Gate:
    """Decides on every request. Without a key in the home it is open, unless `is_required`.

    Once a key was seen it stays closed: a file that is removed or emptied while the server runs opens nothing.

    A request that is refused before it runs (another's adapter, no such model, wrong parameters, a full queue) is given
    back to its key's rate, so that a mistake does not use up the budget of what works. Of these a key may have as many
    again in the same time: a flood of them is throttled, too. What is counted, and over how many servers, is `limits`'.
    """

    def __init__(self, keys: Keys, *, is_required: bool = False, limits: Limits | None = None) -> None:
        self.keys = keys
        self.is_required = is_required
        self.limits = limits or LocalLimits()
        self._has_seen_keys = False
        with contextlib.suppress(Corrupt):
            self.is_open()

    def is_open(self) -> bool:
        """Whether requests need no key. Raises Corrupt if the keys cannot be read, and closes."""
        try:
            self._has_seen_keys = bool(self.keys.all()) or self._has_seen_keys
        except Corrupt:
            self._has_seen_keys = True
            raise
        return not (self.is_required or self._has_seen_keys)

    def is_valid(self, key: Key) -> bool:
        """Whether a key that was found before is still one: neither revoked, expired nor gone."""
        try:
            return any(known.id == key.id and known.is_valid() for known in self.keys.all())
        except Corrupt:
            return False

    def identify(self, path: str, access: Access, authorization: str | None, session: Key | None = None) -> Key | None:
        """The key of a request to `path`, None where none is needed; `session` is that of the browser that sends it.

        Raises Unauthorized, Forbidden, Corrupt.
        """
        if session is not None and authorization is None:
            return self._within_scope(path, access, session)
        scheme, _, token = (authorization or "").partition(" ")
        if access.scope is Scope.OPEN:  # asked by what only looks whether the server lives; a key is shown more
            with contextlib.suppress(Corrupt):
                return None if self.is_open() or scheme.lower() != "bearer" else self.keys.find(token.strip())
            return None
        if self.is_open():
            return None
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthorized("this server requires an API key: send the header 'Authorization: Bearer qhub-...'")
        key = self.keys.find(token.strip())
        if key is None:
            raise Unauthorized("this API key is unknown, revoked or expired: `qhub key create` makes one")
        return self._within_scope(path, access, key)

    def _within_scope(self, path: str, access: Access, key: Key) -> Key:
        if access.scope in (Scope.INFER, Scope.ADMIN) and access.scope.value not in key.scopes:
            raise Forbidden(f"{path} is for keys of scope {access.scope.value}")
        return key

    async def enter(self, access: Access, key: Key | None) -> Lease | None:
        """Count a request in; `leave` counts it out, and is given what this returns.

        Raises Throttled, and LimitsAway if nobody can say how much the key has asked.
        """
        if key is None or not access.is_counted or (key.rate is None and key.concurrency is None):
            return None
        requests, seconds = key.window or (None, None)
        answer = await self.limits.admit(key.id, Bounds(requests, seconds, key.concurrency))
        if isinstance(answer, Refusal):
            raise Throttled(_refused(answer.why, key), answer.seconds)
        return answer

    async def leave(self, lease: Lease | None, status: int = 200) -> None:
        """Count out what `enter` counted in, and was answered with `status`. Once more, it changes nothing."""
        if lease is not None:
            await self.limits.release(lease, ran=status not in REFUSED)


def _refused(why: Why, key: Key) -> str:
    if why == "concurrency":
        return f"this key may run {key.concurrency} requests at once, and they are running"
    return f"this key may ask {key.rate}{' and be refused as often' if why == 'refusals' else ''}: try again later"


def allowed_by(key: Key | None) -> Callable[[str], bool]:
    """Whether a name may be asked by this key, or by somebody who needs none."""
    return key.allows if key is not None else lambda _: True


def sees_keys_by(key: Key | None) -> Callable[[str], bool]:
    """Whether a key's id may be seen by this key, or by who needs none: of scope admin or metrics all, else its own."""
    if key is None or not {"admin", "metrics"}.isdisjoint(key.scopes):
        return lambda _: True
    return lambda identity: identity == key.id


def check_models(key: Key | None, names: Iterable[str]) -> None:
    """Raise Forbidden unless the key may ask all of these names, whether they exist or not."""
    allows = allowed_by(key)
    for name in names:
        if not allows(name):
            raise Forbidden(f"this key is not for '{name}'")
