"""Services: one for each base that is served. All share the registry, the keys and the memory that was asked for."""

import asyncio
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType
from typing import Any

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import LoadedBase
from adapterhub_local.base.origin import Origin, belongs
from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.keys import Key
from adapterhub_local.refs import Reference
from adapterhub_local.registry import Registry
from adapterhub_local.registry.split import split_of
from serve.answers.stored import StoredResponses
from serve.auth import allowed_by
from serve.engine.options import EngineOptions
from serve.errors import BadParameter, ModelNotFound
from serve.follow import Follower
from serve.log.log import RequestLog
from serve.options import HttpOptions
from serve.requests.model_ref import AUTO, read_model
from serve.service import Service

# what all bases have together, in equal parts
SHARED_SIZES = ("kv_bytes", "adapter_bytes", "prefix_bytes", "base_bytes")


class Services:
    """What answers for each base, in the order in which they were given; the first where nothing else decides."""

    def __init__(
        self,
        bases: Sequence[LoadedBase],
        registry: Registry,
        options: EngineOptions | None = None,
        http: HttpOptions | None = None,
        follower: Follower | None = None,
    ) -> None:
        infos = check_bases([base.info for base in bases])
        if len(bases) > 1:
            device = bases[0].model.get_input_embeddings().weight.device.type
            options = share(options or EngineOptions.on(device), len(bases))
        http = http or HttpOptions()
        stored = StoredResponses(http.stored_responses)
        self.log = None  # one for all bases: feedback comes behind the answers that it is about
        if http.request_log is not None:
            all_of_them, size = http.request_log_all, http.request_log_size
            self.log = RequestLog(http.request_log, size, logs_all=all_of_them, note=self._note_logged)
        turns = Turns() if len(bases) > 1 else None
        self.registry = registry
        self.follower = follower
        self.is_stopping = False  # then it is not ready for new requests, though it still takes them
        self._infos = infos
        owners: dict[str, BaseInfo] = {}
        for reference in (*http.pins, *filter(None, [http.router])) if len(infos) > 1 else ():
            self._bring(reference)
            owners[reference] = self._look(reference) or infos[0]
        self.all = [
            Service(
                base,
                registry,
                options,
                _own(http, base.info, owners) if owners else http,
                follower,
                stored=stored,
                turns=turns,
                log=self.log,
            )
            for base in bases
        ]

        for service in self.all:
            service.metrics.is_ready = lambda: self.are_ready

    def __iter__(self) -> Iterator[Service]:
        return iter(self.all)

    @property
    def are_alive(self) -> bool:
        """Whether every engine is."""
        return all(service.loop.is_alive for service in self.all)

    @property
    def are_ready(self) -> bool:
        """Whether new requests are welcome: every engine is alive, and the server is not about to stop."""
        return self.are_alive and not self.is_stopping

    @property
    def first(self) -> Service:
        return self.all[0]

    def of_now(self, model: str, key: Key | None) -> Service:
        """The service that answers for `model`; the first where it names nothing, or nothing that the key is for: it
        then refuses it.

        A followed remote is asked for what is not here: it may wait. Raises BadParameter as `_look`.
        """
        return self.first if len(self.all) == 1 else self._known(model, key) or self._brought(model, key) or self.first

    async def of(self, model: str, key: Key | None) -> Service:
        """The same, without holding up anybody else."""
        if len(self.all) == 1:
            return self.first
        return self._known(model, key) or await asyncio.to_thread(self._brought, model, key) or self.first

    def close(self) -> None:
        """End what reads, compiles and logs, once what is to be logged is."""
        for service in self.all:
            service.close()
        if self.log is not None:
            self.log.close()

    def _note_logged(self, kind: str, is_written: bool) -> None:
        self.first.metrics.note_logged(kind, is_written)

    def apply(self, http: HttpOptions) -> None:
        """See Service.apply: of what may change, nothing is one base's alone."""
        if self.log is not None:
            self.log.logs_all = http.request_log_all
        for service in self.all:
            was = service.http
            own = replace(http, router_threshold=was.router_threshold, router_allows=was.router_allows)
            service.apply(replace(own, pins=was.pins, router=was.router))

    def now(self) -> dict[str, Any]:
        """What the server does now, as /v1/server shows it."""
        found = [service.now() for service in self.all]
        if len(found) == 1:
            return found[0]
        adapters = [adapter for each in found for adapter in each["adapters"]]
        return found[0] | {"adapters": adapters, "bases": [_without(each, "adapters", "remote") for each in found]}

    def _known(self, model: str, key: Key | None) -> Service | None:
        for service in self.all:
            if _names(model, service.base.info):
                return service
        if not all(map(allowed_by(key), self.first.names(model))):
            return self.first  # before anything is looked up or fetched for a key that may not ask it
        if model == AUTO and (routed := next((each for each in self.all if each.routing is not None), None)):
            return routed
        for service in self.all:
            if service.loaded.find(model) is not None:
                return service
        info = self._look(model)
        return next((service for service in self.all if info and service.base.info.name == info.name), None)

    def _brought(self, model: str, key: Key | None) -> Service | None:
        """The service of something that only a followed remote had until now."""
        try:
            return self._known(model, key) if self._bring(model) else None
        except QhubError:
            return None  # the service that is asked then says why

    def _bring(self, model: str) -> bool:
        """Have here what a followed remote has of a model. Raises what fetching it raises."""
        if self.follower is None or (mix := read_model(model, "").mix) is None:
            return False
        self.follower.bring(reference.name for reference, _ in mix.terms)
        self.follower.fetch(reference for reference, _ in mix.terms)
        return True

    def _look(self, model: str) -> BaseInfo | None:
        """The base that `model` names, or that its adapters were made for.

        Raises BadParameter for a name whose traffic is split between bases: which of them is a user's is not known yet.
        """
        for info in self._infos:
            if _names(model, info):
                return info
        try:
            mix = read_model(model, "").mix
        except (ModelNotFound, BadParameter):
            return None
        terms = [reference for reference, _ in mix.terms] if mix is not None else []
        if len(terms) == 1 and str(terms[0]) == model and (sides := split_of(self.registry, model)):
            terms = [Reference(model, alias=alias) for alias, _ in sides]
            found = [info for info in map(self._base_of, terms) if info is not None]
            if any(info.name != found[0].name for info in found):
                message = f"the traffic of '{model}' is split between versions for several bases: ask for one of them"
                raise BadParameter(f"{message}, such as '{terms[0]}'", "model")
        return next(filter(None, map(self._base_of, terms)), None)

    def _base_of(self, reference: Reference) -> BaseInfo | None:
        """The base that a version was made for, None if there is none of either."""
        try:
            origin = Origin(self.registry.resolve(reference).base_fingerprint)
        except QhubError:
            return None
        answers = [(belongs(origin, info).level, info) for info in self._infos]
        fitting = [info for level in ("exact", "named", "shapes") for found, info in answers if found == level]
        return fitting[0] if fitting else None


class Turns(AbstractContextManager[None]):
    """Steps of several engines, one after the other in the order in which they were asked for: each takes all cores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()  # the first has its turn

    def __enter__(self) -> None:
        turn = threading.Event()
        with self._lock:
            self._waiting.append(turn)
            if len(self._waiting) == 1:
                turn.set()
        turn.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._waiting.popleft()
            if self._waiting:
                self._waiting[0].set()


def check_bases(infos: Sequence[BaseInfo]) -> list[BaseInfo]:
    """The bases of one server. Raises InputError if one is there twice, under whatever name."""
    for place, info in enumerate(infos):
        for other in infos[:place]:
            if other.name == info.name:
                raise InputError(f"base '{info.name}' is named twice")
            if other.fingerprint == info.fingerprint:
                raise InputError(f"bases '{other.name}' and '{info.name}' are the same: serve one of them")
    return list(infos)


def share(options: EngineOptions, parts: int) -> EngineOptions:
    """The options of each of several engines, which have together what was asked for."""
    sizes = {name: getattr(options, name) for name in SHARED_SIZES}
    return replace(options, **{name: max(1, size // parts) if size else size for name, size in sizes.items()})


def _own(http: HttpOptions, info: BaseInfo, owners: dict[str, BaseInfo]) -> HttpOptions:
    """What of the options is this base's: pins and a router are of the base that they were made for."""
    pins = tuple(pin for pin in http.pins if owners[pin].name == info.name)
    if http.router is None or owners[http.router].name == info.name:
        return replace(http, pins=pins)
    return replace(http, pins=pins, router=None, router_threshold=None, router_allows=())


def _names(model: str, base: BaseInfo) -> bool:
    """Whether a model is the base's name, or begins with it."""
    return model == base.name or model.startswith(f"{base.name}:")


def _without(table: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in names}
