"""Routing: the model `auto` becomes the adapter that the server's router chooses for a request, or the base.

Which router that is is looked up at every request, as the names of adapters are: `router@prod` follows the alias.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.errors import Incompatible
from adapterhub_local.keys import Key
from adapterhub_local.refs import Reference
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.kinds import check_adapter, check_router
from adapterhub_local.router.features import Embeddings
from adapterhub_local.router.files import read_router
from adapterhub_local.router.router import Choice, Router
from serve.auth import allowed_by
from serve.errors import BadParameter
from serve.options import HttpOptions
from serve.requests.generation import ChatRequest, CompletionRequest, GenerationRequest
from serve.requests.messages import Message
from serve.requests.probes import EmbeddingsRequest, ScoreRequest

NO_ROUTER = (
    "'auto' is not a model here: this server has no router. `qhub router train` makes one, `qhub serve --router NAME` "
    "uses it, and so does `name` under [router] of a cluster.toml"
)
Asked = GenerationRequest | EmbeddingsRequest | ScoreRequest


@dataclass(frozen=True)
class Loaded:
    """A router of the registry, ready to choose."""

    version: Version
    router: Router


class Routing:
    """The router of one server. Safe to use from several threads."""

    def __init__(
        self,
        registry: Registry,
        base: BaseInfo,
        embeddings: Embeddings,
        options: HttpOptions,
        bring: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`bring` has what a reference names come here, if it is elsewhere.

        Raises NotFound, BadFile, and Incompatible for what is not a router of this base, or has a route that is not
        an adapter of it.
        """
        assert options.router is not None, "the server has a router"
        self.registry = registry
        self.base = base
        self.embeddings = embeddings
        self.options = options
        self.reference = Reference.parse(options.router)
        self._lock = threading.Lock()
        self._loaded: Loaded | None = None
        bring(options.router)
        for route in self.now().router.files.routes:
            if route is not None:
                bring(str(route))
            if route is not None and check_adapter(registry.resolve(route)).base_fingerprint != base.fingerprint:
                raise Incompatible(f"{options.router} may choose {route}, which was not made for base '{base.name}'")

    def now(self) -> Loaded:
        """The router that the reference means at this moment, read if it is another than before."""
        version = check_router(self.registry.resolve(self.reference))
        loaded = self._loaded
        if loaded is not None and loaded.version.manifest_digest == version.manifest_digest:
            return loaded
        with self._lock:
            loaded = self._loaded
            if loaded is None or loaded.version.manifest_digest != version.manifest_digest:
                loaded = self._loaded = self._read(version)
            return loaded

    def choose(self, body: Asked, key: Key | None) -> tuple[Version, Choice]:
        """What answers a request, of all that its key may ask, and the router that says so. Raises BadParameter."""
        loaded = self.now()
        allows, patterns = allowed_by(key), self.options.router_allows

        def is_open(name: str) -> bool:
            return allows(name) and (not patterns or any(fnmatchcase(name, pattern) for pattern in patterns))

        return loaded.version, loaded.router.choose(asked_of(body), is_open, self.options.router_threshold)

    def _read(self, version: Version) -> Loaded:
        files = read_router(version.path, version)
        if files.base_fingerprint != self.base.fingerprint:
            raise Incompatible(f"{version} is a router for another base than '{self.base.name}': train one for it")
        return Loaded(version, Router(files, self.embeddings))


def asked_of(body: Asked) -> list[str | Sequence[int]]:
    """What a request is known by: the messages of its user, or its one prompt. Raises BadParameter."""
    match body:
        case ChatRequest():
            return _texts_of_user(body.messages)
        case ScoreRequest():
            return _texts_of_user(body.messages) if body.messages is not None else [body.prompt or ""]
        case CompletionRequest():
            prompt = body.prompt
            if isinstance(prompt, str):
                return [prompt]
            if isinstance(prompt[0], int):
                return [[token for token in prompt if isinstance(token, int)]]
            if len(prompt) == 1 and not isinstance(prompt[0], int):
                return [prompt[0]]
            raise BadParameter("'auto' chooses one adapter for a request: send one prompt in each", "prompt")
    raise BadParameter(
        "'auto' is for answers: vectors that different adapters make cannot be compared, name the model", "model"
    )


def _texts_of_user(messages: Sequence[Message]) -> list[str | Sequence[int]]:
    return [str(message.for_template()["content"]) for message in messages if message.role == "user"]
