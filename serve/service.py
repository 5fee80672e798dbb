"""Service: what a request asks for becomes requests of the engine, each holding its adapter until it has ended."""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapterhub_local.base.load import LoadedBase
from adapterhub_local.errors import BadReference, NotFound
from adapterhub_local.keys import Key
from adapterhub_local.refs import Mix
from adapterhub_local.registry import Registry
from adapterhub_local.registry.split import side_of, split_of
from serve.adapters.held import Loaded
from serve.adapters.leases import Leases
from serve.adapters.usage import Uses
from serve.answers.logprobs import Echo
from serve.answers.models import Target, find_target, is_name
from serve.auth import check_models
from serve.engine.build import build_engine
from serve.engine.loop import EngineLoop
from serve.engine.options import EngineOptions
from serve.engine.request import Request as EngineRequest
from serve.engine.request import State
from serve.errors import ModelNotFound
from serve.metrics import Activity, Metrics
from serve.options import HttpOptions
from serve.read import BodyReader, Choice
from serve.requests.generation import GenerationRequest
from serve.text.generate import Generation

DRAIN_INTERVAL = 0.02  # seconds between looks at whether requests are done


@dataclass(frozen=True)
class Admitted:
    """A request that was admitted: what answers it, and the answer while it is made."""

    target: Target
    generation: Generation
    started: float  # time.monotonic()
    echoes: Sequence[Echo] = ()  # what each choice begins with


class Service:
    """What the endpoints share: the base, the registry that is asked at every request, and the engine."""

    def __init__(
        self,
        base: LoadedBase,
        registry: Registry,
        options: EngineOptions | None = None,
        http: HttpOptions | None = None,
    ) -> None:
        self.base = base
        self.registry = registry
        self.http = http or HttpOptions()
        self.engine = build_engine(base, options)
        self.loop = EngineLoop(self.engine)
        self.leases = Leases(registry, in_memory=lambda: self.engine.pool.users().keys())
        self.reader = BodyReader(base, self.engine, self.http.max_tokens)
        max_pins = self.engine.scheduler.options.max_adapters - 1
        self.loaded = Loaded(registry, self.engine.pool, self.http.lora_root, self.engine.pin, max_pins)
        for reference in dict.fromkeys(self.http.pins):
            self.loaded.load(reference, None, pinned=True)
        self.uses = Uses()
        self.metrics = Metrics(self.activity)
        self._live: dict[str, EngineRequest] = {}
        self._draining: Counter[str] = Counter()  # digests that are being unloaded

    def find(self, model: str) -> Target:
        """What `model` names now. Raises ModelNotFound, BadParameter."""
        name = model.removeprefix(f"{self.base.info.name}:")
        if version := self.loaded.find(name):
            return Target(model, self.base.info, version)
        return find_target(model, self.base.info, self.registry)

    def choose(self, model: str, user: str | None) -> Target:
        """What answers `model` now; of a name whose traffic is split, the side of `user`. Raises as `find`."""
        name = model.removeprefix(f"{self.base.info.name}:")
        if model == self.base.info.name or not is_name(name) or self.loaded.find(name):
            return self.find(model)
        split = split_of(self.registry, name)
        return replace(self.find(f"{name}@{side_of(split, name, user)}"), model=model) if split else self.find(model)

    def names(self, model: str) -> list[str]:
        """The names that `model` speaks of, as far as it can be read: keys are for names."""
        base = self.base.info.name
        if model == base:
            return [base]
        try:
            return [reference.name for reference, _ in Mix.parse(model.removeprefix(f"{base}:")).terms]
        except BadReference:
            return []  # it names nothing, and is refused as such

    async def start(self, body: GenerationRequest, *, request_id: str, started: float, key: Key | None) -> Admitted:
        """Admit a request: what the model's name means now, its adapter in memory, its prompt in the queue."""
        check_models(key, self.names(body.model))
        target, choices, requests = await asyncio.to_thread(self._prepare, body, request_id)
        readers = [choice.calls for choice in choices]
        try:
            deadline = started + self.http.timeout
            generation = Generation(self.loop, requests, self.base.tokenizer, readers, deadline=deadline)
        except BaseException:
            for request in requests:
                self._release(request)
            raise
        self._live |= {request.id: request for request in requests}
        return Admitted(target, generation, started, [choice.echo for choice in choices if choice.echo])

    def finish(self, admitted: Admitted) -> dict[str, Any]:
        """End an answer, however far it came, and count it; what the log should say of it."""
        generation, target = admitted.generation, admitted.target
        generation.close()
        if generation.requests[0].id not in self._live:
            return {}
        for request in generation.requests:
            self._live.pop(request.id, None)
        num_prompt = sum(len(request.prompt) for request in generation.requests)
        name = target.version.name if target.version is not None else self.base.info.name
        self.metrics.note_answer(name, num_prompt, generation.num_completion_tokens, generation.reasons)
        times = [seconds - admitted.started for seconds in generation.times or ()]
        if times:
            self.metrics.note_times(times[0], times[-1], generation.num_completion_tokens // len(generation.requests))
        return {
            "model": target.model,
            "adapter": str(target.version) if target.version is not None else None,
            "digest": target.version.content_digest if target.version is not None else None,
            "prompt_tokens": num_prompt,
            "completion_tokens": generation.num_completion_tokens,
            "first_token_ms": round(times[0] * 1000, 1) if times else None,
            "finish_reasons": generation.reasons,
        }

    def activity(self) -> Activity:
        """What runs and waits now."""
        requests = list(self._live.values())
        names: dict[State, set[str]] = {state: set() for state in State}
        for request in requests:
            if request.adapter is not None:
                names[request.state].add(self.uses.name(request.adapter))
        return Activity(
            self.engine.snapshot(), tuple(sorted(names[State.RUNNING])), tuple(sorted(names[State.WAITING]))
        )

    async def unload(self, name: str, *, force: bool = False) -> int:
        """Hold `name` no longer, and free its adapter when the requests that use it now are done; the bytes freed.

        With `force` these requests end with an error, at once. 0 if other names or later requests keep the adapter:
        a name of the registry still resolves. Raises NotFound if nothing of that name is in memory.
        """
        if name in self.loaded.versions():
            digest = await asyncio.to_thread(self.loaded.unload, name)
        else:
            try:
                version = await asyncio.to_thread(lambda: self.find(name).version)
            except ModelNotFound:
                version = None
            if version is None or version.content_digest not in self.engine.pool.users():
                raise NotFound(f"the lora adapter '{name}' cannot be found: /v1/adapters lists what is in memory")
            digest = version.content_digest
        self._draining[digest] += 1
        try:
            using = {request.id for request in list(self._live.values()) if request.adapter == digest}
            while not force and any(request_id in self._live for request_id in using):
                await asyncio.sleep(DRAIN_INTERVAL)
            if digest in {version.content_digest for version in self.loaded.versions().values()}:
                return 0
            return await asyncio.to_thread(self.engine.unload, digest, force=force)
        finally:
            self._draining -= Counter([digest])

    def _state(self, digest: str, users: dict[str, int], loading: list[str]) -> str:
        if digest in self._draining:
            return "draining"
        return "loading" if digest in loading else "ready" if digest in users else "absent"

    def adapters(self) -> list[dict[str, Any]]:
        """Every adapter in memory or used since the start, by digest: state, memory, requests and last use."""
        users, loading, pinned = self.engine.pool.users(), self.engine.pool.loading(), self.loaded.pinned()
        held = {version.content_digest: name for name, version in self.loaded.versions().items()}
        running: dict[str, int] = {}
        for request in list(self._live.values()):
            if request.adapter is not None and request.state is not State.FINISHED:
                running[request.adapter] = running.get(request.adapter, 0) + 1
        entries, uses = [], self.uses.all()
        for digest in dict.fromkeys([*users, *loading, *uses]):
            use = uses.get(digest)
            entries.append({
                "digest": digest,
                "name": use.name if use is not None else held.get(digest),
                "state": self._state(digest, users, loading),
                "in_slot": digest in self.engine.slots,
                "is_held": digest in held,
                "is_pinned": digest in pinned,
                "bytes": self.engine.pool.bytes_of(digest),
                "requests_now": running.get(digest, 0),
                "requests": use.num_requests if use is not None else 0,
                "last_used": use.last_time if use is not None else None,
            })  # fmt: skip
        return entries

    def _prepare(self, body: GenerationRequest, request_id: str) -> tuple[Target, list[Choice], list[EngineRequest]]:
        """What answers, what is asked for, and the engine's requests, each holding its adapter.

        Reads files: not for the event loop.
        """
        target = self.choose(body.model, body.user)
        choices = self.reader.choices(body)
        requests: list[EngineRequest] = []
        try:
            for choice in choices:
                adapter = self._acquire(target)
                name = f"{request_id}-{uuid.uuid4().hex[:12]}-{choice.name}"
                requests.append(EngineRequest(name, choice.prompt, choice.params, adapter, choice.constraint))
        except BaseException:
            for request in requests:
                self._release(request)
            raise
        return target, choices, requests

    def _acquire(self, target: Target) -> str | None:
        """Have the target's adapter in memory, held for one request, and remember that it was used."""
        if target.version is None:
            return None
        for version in target.versions:
            self.leases.hold(version)
        start = time.monotonic()
        with self.uses.noted(target.version.content_digest, str(target.version)):
            hold = self.engine.pool.acquire(target.version)
        if hold.was_read:
            self.metrics.note_load(time.monotonic() - start)
        return hold.digest

    def _release(self, request: EngineRequest) -> None:
        if request.adapter is not None:
            self.engine.pool.release(request.adapter)
