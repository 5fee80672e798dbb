"""Which tokens of which requests run in the next step: continuous batching with chunked prefill. No torch.

First come, first served, with one exception: while the head of the queue waits for a place among the
batch's adapters, a bounded number of requests that need no new place may pass it.
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from serve.engine.options import EngineOptions
from serve.engine.request import Request, Scheduled, State
from serve.errors import Busy


class Prefixes(Protocol):
    """What is remembered of rows, for requests that begin with the same tokens under the same adapter."""

    def restore(self, request: Request) -> int:
        """Fill the beginning of the request's row; how many tokens that are, fewer than it has."""
        ...

    def keep(self, request: Request) -> None:
        """Remember what is computed in the request's row."""
        ...


class Scheduler:
    """The waiting queue, the running requests and the rows they hold."""

    def __init__(self, options: EngineOptions, prefixes: Prefixes | None = None) -> None:
        self.options = options
        self.prefixes = prefixes
        self.max_passes = 4 * options.max_rows
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self._free_rows = list(range(options.max_rows))  # a heap: low rows first keeps the used ones together
        self._adapters: Counter[str] = Counter()  # running requests of each adapter
        self.is_ready: Callable[[str], bool] = lambda _: True  # whether an adapter is where a batch can use it
        self.pinned: frozenset[str] = frozenset()  # adapters whose places are theirs even if no request runs
        self._num_passes = 0  # requests that passed the present head of the queue

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def adapters(self) -> frozenset[str]:
        """The adapters of the running requests, and those that are pinned."""
        return self.pinned | self._adapters.keys()

    def can_submit(self, count: int = 1) -> bool:
        return len(self.waiting) + count <= self.options.queue_limit

    def submit(self, *requests: Request) -> None:
        """Queue all of `requests`. Raises Busy, and queues none, if there is no room for all."""
        if not self.can_submit(len(requests)):
            raise Busy(f"{len(self.waiting)} requests are waiting already: try again later")
        self.waiting.extend(requests)

    def can_admit(self, request: Request) -> bool:
        """Whether a row is free, and a place among the batch's adapters if the request needs one."""
        return bool(self._free_rows) and (
            request.adapter is None
            or request.adapter in self._adapters
            or (len(self.adapters | {request.adapter}) <= self.options.max_adapters and self.is_ready(request.adapter))
        )

    def schedule(self) -> list[Scheduled]:
        """The next step's tokens: one of every answering request, then prompts in order of admission.

        At most `tokens_per_step` tokens, at least one unless nothing is to be done.
        """
        self._admit_waiting()
        budget = self.options.tokens_per_step
        batch = []
        for request in self.running:
            if request.num_tokens - request.num_computed == 1:
                batch.append(Scheduled(request, request.num_computed, 1))
                budget -= 1
        for request in self.running:
            remaining = request.num_tokens - request.num_computed
            if remaining > 1 and budget > 0:
                count = min(remaining, budget)
                batch.append(Scheduled(request, request.num_computed, count))
                budget -= count
        return batch

    def update(self, item: Scheduled, token: int | None) -> None:
        """Note that `item` was computed and, if it wanted one, that `token` was sampled; finish if that ends it."""
        request = item.request
        request.num_computed = item.start + item.num_tokens
        if token is None:
            return
        is_first = not request.output
        request.output.append(token)
        reason = None
        if token in request.params.stop_token_ids:
            reason = "stop"
        elif len(request.output) >= request.params.max_tokens:
            reason = "length"
        if self.prefixes is not None and (is_first or reason):
            self.prefixes.keep(request)
        if reason:
            self.finish(request, reason)

    def finish(self, request: Request, reason: str) -> None:
        """Take `request` out, wherever it is, and free its row."""
        if request.state is State.WAITING:
            if self.waiting[0] is request:
                self._num_passes = 0
            self.waiting.remove(request)
        elif request.state is State.RUNNING:
            assert request.row is not None
            self.running.remove(request)
            heapq.heappush(self._free_rows, request.row)
            request.row = None
            if request.adapter is not None:
                self._adapters[request.adapter] -= 1
                if not self._adapters[request.adapter]:
                    del self._adapters[request.adapter]
        request.state = State.FINISHED
        request.finish_reason = reason

    def _admit_waiting(self) -> None:
        while self.waiting and self.can_admit(self.waiting[0]):
            self._admit(self.waiting[0])
            self._num_passes = 0
        if not self.waiting or not self._free_rows:
            return
        for request in list(self.waiting)[1:]:
            if self._num_passes >= self.max_passes or not self._free_rows:
                break
            if self.can_admit(request):
                self._admit(request)
                self._num_passes += 1

    def _admit(self, request: Request) -> None:
        self.waiting.remove(request)
        request.row = heapq.heappop(self._free_rows)
        request.state = State.RUNNING
        if self.prefixes is not None:
            request.num_computed = request.num_cached = self.prefixes.restore(request)
        self.running.append(request)
        if request.adapter is not None:
            self._adapters[request.adapter] += 1
