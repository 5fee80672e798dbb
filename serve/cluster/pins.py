"""Pins: which versions a request's `model` means now, looked up once for all replicas."""

import asyncio
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from adapterhub_local.durable import canonical_json, digest_bytes
from adapterhub_local.errors import NotFound, QhubError
from adapterhub_local.keys import Key
from adapterhub_local.refs import Mix, Reference
from adapterhub_local.registry import Registry
from adapterhub_local.registry.split import side_of, split_of
from serve.auth import allowed_by
from serve.follow import Follower
from serve.http.bodies import room_of
from serve.requests.model_ref import AUTO, ModelRef, read_model
from serve.requests.ollama import plain_name

BRINGS = 8  # requests that wait for what a remote has


@dataclass(frozen=True)
class Pinned:
    """`versions`, as a mix of references by digest; `affinity`: equal for equal contents. None: not known.

    `is_auto`: a router has to choose first, which a replica has.
    """

    versions: str | None = None
    affinity: str | None = None
    is_auto: bool = False


class Pins:
    """Finds what requests mean, in one registry, which may follow a remote. Safe to use from several threads."""

    def __init__(
        self, base: str, registry: Registry, follower: Follower | None = None, *, has_router: bool = False
    ) -> None:
        self.base = base
        self.has_router = has_router
        self.registry = registry
        self.follower = follower
        self._bringing = ThreadPoolExecutor(BRINGS, "bringing")

    async def find(self, body: bytes, path: str, key: Key | None = None) -> Pinned:
        """What the body of a request to `path` asks for; what a remote has and the home has not is waited for.

        Nothing if it asks for the base, for what is not there, what the key may not ask or what cannot be read: a
        replica says so, in the words of the endpoint.
        """
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(room_of(body), self._now, body, path, key)
        return found if isinstance(found, Pinned) else await loop.run_in_executor(self._bringing, self._brought, *found)

    def close(self) -> None:
        """Bring nothing more."""
        self._bringing.shutdown(wait=False, cancel_futures=True)

    def _now(self, body: bytes, path: str, key: Key | None) -> Pinned | tuple[ModelRef, str | None]:
        """What it is at this moment; what is asked for, and by which user, if a remote must be asked first."""
        asked = read_asked(body, path, self.base)
        if asked is not None and self.has_router and asked[0].text == AUTO:
            return Pinned(is_auto=True)
        if asked is None or not all(map(allowed_by(key), asked[0].names)):
            return Pinned()
        ref, user = asked
        if self.follower is not None and self.follower.is_new(ref.names):
            return asked
        try:
            return self._look(ref, user)
        except NotFound:
            return Pinned() if self.follower is None else asked
        except QhubError:
            return Pinned()

    def _brought(self, ref: ModelRef, user: str | None) -> Pinned:
        """The same, once what the remote has of it is here."""
        assert self.follower is not None, "nothing is brought without a remote"
        try:
            self.follower.bring(ref.names)
            try:
                return self._look(ref, user)
            except NotFound:
                assert ref.mix is not None, "only adapters are looked for"
                self.follower.fetch(reference for reference, _ in ref.mix.terms)
                return self._look(ref, user)
        except QhubError:
            return Pinned()

    def _look(self, ref: ModelRef, user: str | None) -> Pinned:
        if ref.name is not None and (split := split_of(self.registry, ref.name)):
            ref = ref.on_side(side_of(split, ref.name, user))
        assert ref.mix is not None, "only adapters are looked for"
        found = [(self.registry.resolve(reference), weight) for reference, weight in ref.mix.terms]
        # by digest: in another home that follows the remote a number may be another's
        by_digest = ((Reference(version.name, digest=version.manifest_digest), weight) for version, weight in found)
        return Pinned(
            str(Mix(tuple(by_digest))), affinity_of((version.content_digest, weight) for version, weight in found)
        )


def affinity_of(contents: Iterable[tuple[str, float]]) -> str:
    """What is equal for equal contents (their digests) in equal proportions, however they are named."""
    return digest_bytes(canonical_json(sorted([digest, weight] for digest, weight in contents)))


def read_asked(body: bytes, path: str, base: str) -> tuple[ModelRef, str | None] | None:
    """The adapters that a body asks for and the user it names; None if it asks for the base, or cannot be read."""
    try:
        asked = json.loads(body)
        model, user = asked["model"], asked.get("user")
        if path == "/v1/messages":
            user = (asked.get("metadata") or {}).get("user_id")
        elif path.startswith("/api/"):
            model = plain_name(model)
        terms = [(term["ref"], float(term.get("weight", 1.0))) for term in asked.get("adapters") or ()]
        ref = read_model(model, base, terms)
    except (QhubError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return (ref, user if isinstance(user, str) else None) if ref.mix is not None else None
