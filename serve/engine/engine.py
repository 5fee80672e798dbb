"""Engine: one step is schedule, acquire, forward, sample, update. Owns the pages, the slots and the adapters' leases.

Knows nothing of text, names and HTTP. `submit` and `abort` may be called from any thread, `step` from one.
"""

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from adapterhub_local.errors import QhubError
from serve.adapters.loader import SlotLoader
from serve.adapters.mixture import Mixture
from serve.adapters.pool import AdapterPool, Hold
from serve.adapters.record import AdapterStatus
from serve.adapters.slots import Slots
from serve.adapters.source import Source
from serve.engine.compute import Compute
from serve.engine.options import EngineOptions
from serve.engine.pages import PAGE, PagePool
from serve.engine.request import PromptOutput, Request, Scheduled, State, TokenOutput
from serve.engine.runner import Runner
from serve.engine.sampler import Sampler
from serve.engine.scheduler import Scheduler
from serve.engine.speculate import Costs
from serve.engine.stats import Snapshot, Stats, take_snapshot
from serve.engine.verify import Run
from serve.errors import AdapterUnloaded, ContextTooLong, GenerationFailed

logger = logging.getLogger(__name__)
LOAD_WAIT = 0.1  # seconds that a step without work waits for an adapter, before it looks whether there is other work


class Engine:
    """Answers requests, many in one batch, each with its own adapter."""

    def __init__(
        self,
        runner: Runner,
        slots: Slots,
        pool: AdapterPool,
        options: EngineOptions,
        pages: PagePool,
        max_length: int,
        max_scored: int | None = None,
    ) -> None:
        self.options = options
        self.runner = runner
        self.slots = slots
        self.pool = pool
        self.pages = pages
        self.max_length = min(max_length, pages.num_pages * PAGE)  # tokens of prompt and answer together
        costs = Costs(runner.device.type) if options.speculation == "auto" else None
        self.scheduler = Scheduler(options, pages, slots.__contains__, lambda: pool.pinned, max_scored, costs)
        self.stats = Stats()
        self._samplers: dict[str, Sampler] = {}
        self.compute = Compute(runner, slots, self._samplers, costs)
        self._requests: dict[str, Request] = {}
        self._aborted: set[str] = set()
        self._ended: list[TokenOutput] = []  # of requests that ended outside a step
        self._lock = threading.Lock()
        self._exclusive = threading.Lock()  # held by a step, and by what must not happen during one
        self.loader = SlotLoader(slots, pool, self.scheduler.wanted, self._lock, self._between_steps)
        self._next = threading.Lock()  # who comes next: without it the next step could always be first

    @property
    def has_work(self) -> bool:
        with self._lock:
            return self.scheduler.has_work or bool(self._ended)

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none. The adapter of each must be acquired; the engine releases it in the end.

        Raises ContextTooLong, or Busy if the queue is full; the caller then keeps the adapters.
        """
        for request in requests:
            self.check_length(len(request.prompt), request.params.max_tokens)
        with self._lock:
            self.scheduler.submit(*requests)
            for request in requests:
                assert request.id not in self._requests, request.id
                self._requests[request.id] = request
                self._samplers[request.id] = Sampler(request)
            self._prefetch()

    def check_length(self, num_prompt: int, max_tokens: int) -> None:
        """Raise ContextTooLong unless prompt and answer fit into the model's context and the KV cache."""
        if num_prompt + max_tokens > self.max_length:
            is_small = self.max_length == self.pages.num_pages * PAGE
            raise ContextTooLong(
                f"the context is {self.max_length} tokens{', all that the KV cache holds' if is_small else ''}: the "
                f"prompt has {num_prompt} and {max_tokens} more were asked for. Shorten the prompt or ask for fewer"
                f"{', or start the server with a larger --kv-cache-mb' if is_small else ''}"
            )

    def abort(self, request_id: str) -> None:
        """End a request before the next step, if it has not ended; it gives no more output."""
        with self._lock:
            if request_id in self._requests:
                self._aborted.add(request_id)

    @torch.inference_mode()
    def unload(self, digest: str, *, force: bool = False) -> int:
        """Free an adapter's slot and memory between two steps; the bytes that are free now.

        0 while requests use it: they finish, and its memory goes when others need it. With `force` they end with
        an error.
        """
        with self._between_steps(), self._lock:
            users = [request for request in self._requests.values() if request.adapter == digest]
            if users and not force:
                return 0
            for request in users:
                is_aborted = request.id in self._aborted
                self._leave(request, "error")
                if is_aborted:  # nobody waits for its outputs
                    continue
                error = AdapterUnloaded("the adapter was unloaded before the answer was complete")
                self._ended.append(TokenOutput(request.id, None, error=error))
        return self.loader.drop(digest, lambda: any(each.adapter == digest for each in self._requests.values()))

    def has(self, digest: str) -> bool:
        """Whether an adapter is in memory."""
        return digest in self.pool

    def acquire(self, source: Source | Mixture, *, is_request: bool = False) -> Hold:
        """Hold an adapter in memory; `is_request`: for one that is about to be submitted. Raises as the pool's."""
        return self.pool.acquire(source, is_request=is_request)

    def release(self, digest: str) -> None:
        """Undo one `acquire` whose hold no request was submitted with."""
        self.pool.release(digest)

    def keep(self, digest: str, name: str, *, pinned: bool) -> None:
        """Have a name keep an adapter in memory by the hold that the caller has, and in a slot if it is `pinned`.

        Raises Busy and BadParameter as the pool's.
        """
        with self._lock:
            self.pool.keep(digest, name, pinned=pinned)
            self._prefetch()

    def unkeep(self, digest: str, name: str) -> None:
        """Undo `keep`."""
        with self._lock:
            self.pool.unkeep(digest, name)

    def draining(self, digest: str) -> AbstractContextManager[None]:
        """While it is open the adapter is shown as draining."""
        return self.pool.draining(digest)

    def leased(self, since: float) -> set[str]:
        """Digests of the adapters whose files are wanted: in memory, or asked for `since` (on the monotonic clock)."""
        return self.pool.leased(since)

    def adapters(self) -> list[AdapterStatus]:
        """Every adapter in memory, being read or used since the start."""
        with self._lock:
            running = Counter(each.adapter for each in self._requests.values() if each.adapter is not None)
        return self.pool.status(running)

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        """Compute one batch; what is new of every request in it that got a token or failed. Raises DeviceLost."""
        with self._between_steps():
            with self._lock:
                self._reap()
                self._prefetch()
                batch = self.scheduler.schedule()
                outputs, self._ended = self._ended, []
                if dirty := self.pages.take_dirty():
                    self.runner.cache.clear(dirty)
            results = self.compute.results(batch) if batch else {}
            with self._lock:
                if batch:
                    counts = {key: len(run) if isinstance(run, list) else 0 for key, run in results.items()}
                    self.stats.note(batch, counts, self.scheduler, self.compute.num_failed)
                outputs += [output for item in batch for output in self._update(item, results[item.request.id])]
        if not batch and not outputs:
            self.loader.wait(LOAD_WAIT)
        return outputs

    def fail_all(self, error: Exception | None = None) -> list[TokenOutput]:
        """End every request with an error, by default the one for a step that failed for a reason of our own."""
        with self._lock:
            requests = list(self._requests.values())
            for request in requests:
                self._leave(request, "error")
        error = error or GenerationFailed("the server failed on this request; its log says why")
        return [TokenOutput(request.id, None, error=error) for request in requests]

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        with self._next:
            self._exclusive.acquire()
        try:
            yield
        finally:
            self._exclusive.release()

    def _prefetch(self) -> None:
        """Have the wanted adapters put into slots; requests whose adapter cannot be end, under the lock."""
        for digest, reason in self.loader.prefetch().items():
            logger.error("adapter %s could not be put into a slot", digest, exc_info=reason)
            for request in [each for each in self._requests.values() if each.adapter == digest]:
                self._leave(request, "error")
                error = GenerationFailed("there is no memory for the adapter on this device")
                self._ended.append(TokenOutput(request.id, None, error=error))

    def _update(self, item: Scheduled, result: Run) -> list[TokenOutput]:
        """Note one request's result, under the lock."""
        request = item.request
        if isinstance(result, Exception):
            self._leave(request, "error")
            error = result if isinstance(result, QhubError) else GenerationFailed("the model failed on this request")
            return [TokenOutput(request.id, None, error=error)]
        is_first = not request.output
        self.scheduler.update(item, [each.token for each in result])
        if request.state is State.FINISHED:
            self._leave(request, request.finish_reason or "stop")
        if not result:
            return []
        prompt = (
            PromptOutput(request.num_cached, request.begun, tuple(request.scores), request.vector) if is_first else None
        )
        if len(result) == 1:  # as nearly always
            return [TokenOutput(request.id, result[0], request.finish_reason, prompt=prompt)]
        first, *between, last = result
        return [
            TokenOutput(request.id, first, prompt=prompt),
            *(TokenOutput(request.id, each) for each in between),
            TokenOutput(request.id, last, request.finish_reason),
        ]

    def _reap(self) -> None:
        """Take out what was aborted since the last step, under the lock."""
        for request_id in list(self._aborted):
            self._leave(self._requests[request_id], "abort")

    def _leave(self, request: Request, reason: str) -> None:
        if request.state is not State.FINISHED:
            self.scheduler.finish(request, reason)
        del self._requests[request.id], self._samplers[request.id]
        self._aborted.discard(request.id)
        if request.adapter is not None:
            self.pool.release(request.adapter)

    def snapshot(self) -> Snapshot:
        """What runs, waits and is held now, and what was done since the start."""
        with self._lock:
            running, waiting = list(self.scheduler.running), list(self.scheduler.waiting)
            return take_snapshot(self, running, waiting)
