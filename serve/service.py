"""Service: what a request asks for becomes requests of the engine, each holding its adapter until it has ended."""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from adapterhub_local.base.load import LoadedBase
from adapterhub_local.base.renderer import shared
from adapterhub_local.errors import NotFound
from adapterhub_local.keys import PRIORITIES, Key
from adapterhub_local.refs import Reference
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.split import side_of, split_of
from adapterhub_local.router.features import Embeddings
from serve.adapters.held import Loaded
from serve.adapters.leases import Leases
from serve.adapters.record import AdapterStatus
from serve.adapters.source import Folder
from serve.answers.logprobs import Echo
from serve.answers.models import Target, adapter_entry, find_target, residents
from serve.answers.stored import StoredResponses
from serve.auth import allowed_by, check_models
from serve.course import MAX_MODEL, Course
from serve.engine.build import build_engine
from serve.engine.loop import EngineLoop
from serve.engine.options import EngineOptions
from serve.engine.request import LOW, NORMAL, Submission
from serve.errors import Elsewhere, Forbidden, ModelNotFound
from serve.follow import Follower
from serve.log.log import RequestLog
from serve.metrics import Metrics
from serve.options import HttpOptions
from serve.read import BodyReader, Choice
from serve.requests.begun import Begun
from serve.requests.found import NOTHING, Found, Routed
from serve.requests.generation import ChatRequest
from serve.requests.model_ref import AUTO, ModelRef, read_model
from serve.requests.probes import EmbeddingsRequest, ScoreRequest
from serve.routing import NO_ROUTER, Asked, Routing
from serve.text.compiler import PROCESSES
from serve.text.generate import Generation
from serve.text.noted import Known
from serve.text.prompt import PLAIN
from serve.threads import compute_alone

BRINGS = 8  # requests that wait for what a remote has
LOADS = 4  # cold adapters that are read at the same time
DRAIN_INTERVAL = 0.02  # seconds between looks at whether requests are done


@dataclass(frozen=True)
class Admitted:
    """A request that was admitted: what answers it, and the answer while it is made."""

    target: Target
    generation: Generation
    course: Course
    echoes: Sequence[Echo] = ()  # what each choice begins with


class Service:
    """What the endpoints share: the base, the registry that is asked at every request, and the engine."""

    def __init__(
        self,
        base: LoadedBase,
        registry: Registry,
        options: EngineOptions | None = None,
        http: HttpOptions | None = None,
        follower: Follower | None = None,
        *,
        stored: StoredResponses,
        turns: AbstractContextManager[None] | None = None,
        log: RequestLog | None = None,
    ) -> None:
        """`stored`, `turns` and `log`: what this base shares with others of the same server."""
        self.base = base
        self.registry = registry
        self.follower = follower
        self.http = http or HttpOptions()
        self.leases = Leases(registry)
        self.engine = build_engine(base, options, self.leases)
        self.loop = EngineLoop(self.engine, turns)
        self.reader = BodyReader(base, self.engine, self.http.max_tokens)
        self.routing = self._make_routing()
        self.stored = stored
        if base.tokenizer.chat_template:
            shared().warm()
        self.loaded = Loaded(registry, self.engine, self.http.lora_root)
        for reference in dict.fromkeys(self.http.pins):
            self.bring(reference)
            self.loaded.load(reference, None, pinned=True)
        self.metrics = Metrics(self.engine.snapshot, self._residents)
        self.log = log
        # rooms of their own for what takes long, so that it never fills the one where all others are read
        self.forms = ThreadPoolExecutor(PROCESSES, "forms", compute_alone)
        self.loading = ThreadPoolExecutor(LOADS, "loading", compute_alone)
        self.bringing = ThreadPoolExecutor(BRINGS, "bringing", compute_alone)
        self._live: dict[str, str | None] = {}  # id of a request that has not been answered -> its adapter's digest

    def apply(self, http: HttpOptions) -> None:
        """Have requests that come from now on treated as other options say, of which some count at the start alone."""
        self.http = http
        self.reader.max_tokens = http.max_tokens
        self.stored.resize(http.stored_responses)

    def close(self) -> None:
        """End what reads and compiles."""
        for room in (self.forms, self.loading, self.bringing):
            room.shutdown(wait=False, cancel_futures=True)
        self.reader.grammars.close()

    def read(self, model: str) -> ModelRef:
        """Which weights a name stands for. Raises ModelNotFound, BadParameter."""
        return read_model(model, self.base.info.name)

    def names(self, model: str) -> tuple[str, ...]:
        """The names that `model` speaks of, none if it cannot be read: then it is refused as such."""
        try:
            return self.read(model).names
        except ModelNotFound:
            return ()

    def bring(self, model: str) -> None:
        """Have here what a followed remote has of a reference. Raises BadReference, and what fetching it raises."""
        if self.follower is not None:
            reference = Reference.parse(model)
            self.follower.bring([reference.name])
            self.follower.fetch([reference])

    def find(self, ref: ModelRef, key: Key | None) -> Target:
        """What that is now, if the key may ask it; `auto` is the base before anything is asked.

        Raises Forbidden, ModelNotFound, BadParameter.
        """
        if ref.text == AUTO and self.routing is not None:
            return Target(AUTO, self.base.info, None)
        check_models(key, ref.names)
        return self._followed(ref, lambda: self._find(ref, key))

    def choose(self, ref: ModelRef, user: str | None, key: Key | None, *, waits: bool = True) -> Target:
        """The same, but of a name whose traffic is split the side of `user`. Raises as `find`.

        With `waits`, what has to come from a followed remote first is waited for.
        """
        check_models(key, ref.names)
        look = partial(self._choose, ref, user, key)
        return self._followed(ref, look) if waits else look()

    def _find(self, ref: ModelRef, key: Key | None) -> Target:
        if ref.name == ref.text == AUTO and not self.registry.versions(AUTO) and self.loaded.find(AUTO) is None:
            raise ModelNotFound(NO_ROUTER)
        target = find_target(ref, self.base.info, self.registry, self.loaded.find(ref.name))
        if target.version is None:  # also what weights of zero leave
            check_models(key, [self.base.info.name])
        return target

    def _choose(self, ref: ModelRef, user: str | None, key: Key | None) -> Target:
        if ref.name is not None and self.loaded.find(ref.name) is None and (split := split_of(self.registry, ref.name)):
            ref = ref.on_side(side_of(split, ref.name, user))
        return self._find(ref, key)

    def _is_new(self, ref: ModelRef) -> bool:
        """Whether a followed remote may have to be asked for it first."""
        if ref.text == AUTO and self.routing is not None and ref.name is not None:  # it names nothing yet
            return False
        if self.follower is None or ref.mix is None or self.loaded.find(ref.name) is not None:
            return False
        return self.follower.is_new(ref.names)

    def _followed(self, ref: ModelRef, look: Callable[[], Target]) -> Target:
        """What `look` finds, of a followed remote once it is here. Raises as `look`, and what fetching it raises."""
        if self.follower is None or ref.mix is None:
            return look()
        if self._is_new(ref):
            self.follower.bring(ref.names)
        try:
            return look()
        except ModelNotFound:
            if not self.follower.fetch(reference for reference, _ in ref.mix.terms):
                raise
            return look()

    async def _find_soon(self, body: Asked, key: Key | None, found: Found) -> Target:
        """As `target`; what has to come from a followed remote is waited for where it holds up nobody else."""
        ref = body.model_ref(self.base.info.name)
        if not self._is_new(ref if found.versions is None else ref.pinned(found.versions)):
            try:
                return await asyncio.to_thread(self.target, body, key, found, waits=self.follower is None)
            except ModelNotFound:
                if self.follower is None:
                    raise
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.bringing, self.target, body, key, found)

    def target(self, body: Asked, key: Key | None, found: Found = NOTHING, *, waits: bool = True) -> Target:
        """What answers a request: what its model means now, or, if that is `auto`, what the router chooses.

        `found` is what was found before. Raises as `choose`, and Elsewhere with what a router chose if that is asked.
        """
        ref = body.model_ref(self.base.info.name)
        if found.versions is not None or found.routed is not None:  # without versions it is the base
            known = self.read(self.base.info.name) if found.versions is None else ref.pinned(found.versions)
            target = self.choose(known, body.user, key, waits=waits)
            return replace(target, model=ref.text, routed=found.routed)
        if ref.text != AUTO or self.routing is None:
            return self.choose(ref, body.user, key, waits=waits)
        router, choice = self.routing.choose(body, key)
        chosen = str(choice.reference) if choice.reference is not None else self.base.info.name
        if choice.reference is None and not allowed_by(key)(chosen):
            raise Forbidden(f"'auto' found no adapter for this that the key is for, and it is not for '{chosen}'")
        routed = Routed(str(router), chosen, choice.confidence, choice.reason)
        target = replace(self.choose(self.read(chosen), body.user, key, waits=waits), model=AUTO, routed=routed)
        self.metrics.note_route(choice.reference.name if choice.reference is not None else chosen, choice.reason)
        if found.is_asking and isinstance(target.version, Version):
            version = target.version
            pinned = Reference(version.name, digest=version.manifest_digest)
            raise Elsewhere({"versions": str(pinned), "digest": version.content_digest, "routed": asdict(routed)})
        return target

    async def start(
        self, body: Asked, *, request_id: str, started: float, key: Key | None, course: Course, found: Found = NOTHING
    ) -> Admitted:
        """Admit a request: what the model's name means now, its adapter in memory, its prompt in the queue.

        `found` is what was found before, by who sent the request here; `course` learns how far it comes. Raises as
        `target` and the reader.
        """
        loop = asyncio.get_running_loop()
        course.model = body.model[:MAX_MODEL]
        target = await self._find_soon(body, key, found)
        course.label, course.names = target.label.text, target.label.names
        if target.version is not None:
            course.adapter, course.digest = str(target.version), target.version.content_digest
        choices = await loop.run_in_executor(self.forms if body.has_form else None, self._read, target, body)
        room = self.loading if self._is_cold(target) else None
        salt = self._salt(body, key)
        priority = LOW + PRIORITIES.index(key.priority) if key is not None else NORMAL
        known = Known(found.begun or Begun())
        requests = await loop.run_in_executor(room, self._prepare, target, choices, request_id, salt, priority, known)
        readers, thinkers = [choice.calls for choice in choices], [choice.thoughts for choice in choices]
        try:
            deadline = started + self.http.timeout - known.begun.spent
            generation = Generation(
                self.loop, requests, self.base.tokenizer, readers, thinkers, deadline=deadline, known=known
            )
        except BaseException:
            for request in requests:
                self._release(request)
            raise
        course.ready = time.monotonic()
        self._live |= {request.id: request.adapter for request in requests}
        return Admitted(target, generation, course, [choice.echo for choice in choices if choice.echo])

    def finish(self, admitted: Admitted, started: float, key: Key | None) -> dict[str, Any]:
        """End an answer to a request that came when it `started`, however far it came, and count it; what the log
        should say of it."""
        generation, target, course = admitted.generation, admitted.target, admitted.course
        generation.close()
        if generation.requests[0].id not in self._live:
            return {}
        for request in generation.requests:
            self._live.pop(request.id, None)
        course.num_prompt = sum(len(request.prompt) for request in generation.requests)
        course.num_completion, course.reasons = generation.num_completion_tokens, generation.reasons
        course.begun = min(filter(None, (prompt.begun for prompt in generation.prompts)), default=None)
        if generation.times is not None:
            course.first, course.last = generation.times
        self.metrics.note_answer(course, key.id if key is not None else None, started, time.monotonic())
        return {
            "model": target.model,
            "adapter": course.adapter,
            "digest": course.digest,
            "prompt_tokens": course.num_prompt,
            "completion_tokens": course.num_completion,
            "first_token_ms": round((course.first - started) * 1000, 1) if course.first is not None else None,
            "finish_reasons": course.reasons,
            **(target.routed.to_json() if target.routed is not None else {}),
        }

    def count_tokens(self, body: ChatRequest, key: Key | None) -> int:
        """How many tokens a chat's prompt has, for what `model` means now. Raises as `target` and the reader."""
        target = self.target(body, key)
        return len(self.reader.prompt(body, target.chat_settings))

    async def unload(self, name: str, *, force: bool = False) -> int:
        """Hold `name` no longer, and free its adapter when the requests that use it now are done; the bytes freed.

        With `force` these requests end with an error, at once. 0 if other names or later requests keep the adapter:
        a name of the registry still resolves. Raises NotFound if nothing of that name is in memory.
        """
        if name in self.loaded.sources():
            digest = await asyncio.to_thread(self.loaded.unload, name)
        else:
            try:
                version = await asyncio.to_thread(lambda: self.find(self.read(name), None).version)
            except ModelNotFound:
                version = None
            digest = version.content_digest if version is not None else ""
            if not any(each.digest == digest and each.num_bytes for each in self.engine.adapters()):
                raise NotFound(f"the lora adapter '{name}' cannot be found: /v1/adapters lists what is in memory")
        with self.engine.draining(digest):
            using = {request_id for request_id, adapter in list(self._live.items()) if adapter == digest}
            while not force and not using.isdisjoint(self._live):
                await asyncio.sleep(DRAIN_INTERVAL)
            if digest in {source.content_digest for source in self.loaded.sources().values()}:
                return 0
            return await asyncio.to_thread(self.engine.unload, digest, force=force)

    def now(self) -> dict[str, Any]:
        """What the server does now, as /v1/server shows it: base, engine and adapters."""
        base = self.base.info
        followed = {"remote": self.follower.state()} if self.follower is not None else {}
        return {
            **followed,
            "base": {"name": base.name, "fingerprint": base.fingerprint},
            "engine": self.engine.snapshot().to_json(),
            "adapters": [adapter_entry(status) | {"names": status.label.names} for status in self.adapters()],
        }

    def adapters(self) -> list[AdapterStatus]:
        """Every adapter in memory or used since the start: state, memory, requests and last use."""
        return self.engine.adapters()

    def _residents(self) -> Iterable[tuple[str, AdapterStatus]]:
        """What is in memory, under each name that stands for it."""
        sources = self.loaded.sources().items()
        folders = {name: source.content_digest for name, source in sources if isinstance(source, Folder)}
        return residents(self.registry, self.engine.adapters(), folders)

    def router(self) -> Version | None:
        """The router that `auto` stands for now, if the server has one."""
        return self.routing.now().version if self.routing is not None else None

    def _make_routing(self) -> Routing | None:
        if self.http.router is None:
            return None
        encode = partial(self.reader.prompts.encoder.encode, add_special_tokens=False)
        weight = self.base.model.get_input_embeddings().weight
        return Routing(self.registry, self.base.info, Embeddings(encode, weight), self.http, self.bring)

    def _salt(self, body: Asked, key: Key | None) -> str:
        """What keeps apart the prefixes of those that do not share them."""
        owner = key.id if key is not None and not self.http.share_prefixes else ""
        return f"{owner}\0{body.cache_salt or ''}"

    def _read(self, target: Target, body: Asked) -> list[Choice]:
        """The answers that are asked for, with prompts as what answers was trained on."""
        if isinstance(body, EmbeddingsRequest):
            return self.reader.probes(body)
        if isinstance(body, ScoreRequest):
            return self.reader.probes(body, target.chat_settings if body.messages is not None else PLAIN)
        return self.reader.choices(body, target.chat_settings if isinstance(body, ChatRequest) else PLAIN)

    def _is_cold(self, target: Target) -> bool:
        """Whether its adapter has to be read first, which takes long on slow storage."""
        if target.version is None:
            return False
        return not self.engine.has(target.version.content_digest)

    def _prepare(
        self, target: Target, choices: list[Choice], request_id: str, salt: str, priority: int, known: Known
    ) -> list[Submission]:
        """The engine's requests, each holding its adapter but for those that have ended where they were begun.

        Reads files: not for the event loop.
        """
        requests: list[Submission] = []
        try:
            for index, choice in enumerate(choices):
                adapter = self._acquire(target) if index not in known.ended else None
                name = f"{request_id}-{uuid.uuid4().hex[:12]}-{choice.name}"
                asked = Submission(name, choice.prompt, choice.params, adapter, choice.constraint, salt, priority)
                requests.append(known.begin(asked, index))
        except BaseException:
            for request in requests:
                self._release(request)
            raise
        return requests

    def _acquire(self, target: Target) -> str | None:
        """Have the target's adapter in memory, held for one request, and remember that it was used."""
        if target.version is None:
            return None
        start = time.monotonic()
        hold = self.engine.acquire(target.version, is_request=True)
        if hold.was_read:
            self.metrics.note_load(time.monotonic() - start)
        return hold.digest

    def _release(self, request: Submission) -> None:
        if request.adapter is not None:
            self.engine.release(request.adapter)
