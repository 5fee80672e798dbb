"""Which tokens of which requests run in the next step: continuous batching with chunked prefill. No torch.

First come, first served, with one exception: while the head of the queue waits for a place among the batch's adapters,
or for a page that another request computes, others may pass it, a bounded number for a bounded time. When pages run
out, the request admitted last gives back its own and goes to the head of the queue, to be computed again.
"""

from collections import deque
from collections.abc import Callable

from serve.engine.options import EngineOptions
from serve.engine.pages import PAGE, PagePool
from serve.engine.request import Request, Scheduled, State
from serve.errors import Busy

MAX_WAITED = 256  # steps in which others may pass the head of the queue


class Scheduler:
    """The waiting queue and the running requests.

    `is_ready`: whether an adapter is where a batch can use it; `pinned`: adapters whose places are theirs even if no
    request runs. `max_scored`: tokens of prompts in one step whose log-probabilities are wanted, None: all of a step.
    """

    def __init__(
        self,
        options: EngineOptions,
        pages: PagePool,
        *,
        is_ready: Callable[[str], bool] = lambda _: True,
        pinned: Callable[[], frozenset[str]] = frozenset,
        max_scored: int | None = None,
    ) -> None:
        self.options = options
        self.pages = pages
        self.is_ready = is_ready
        self.pinned = pinned
        self.max_scored = options.tokens_per_step if max_scored is None else max_scored
        self.max_passes = 4 * options.max_rows
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.num_preemptions = 0
        self.num_cached = 0  # tokens that were not computed because their pages were known

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def adapters(self) -> frozenset[str]:
        """The adapters of the running requests, and those that are pinned."""
        return self.pinned() | {request.adapter for request in self.running if request.adapter is not None}

    def can_submit(self, count: int = 1) -> bool:
        return len(self.waiting) + count <= self.options.queue_limit

    def submit(self, *requests: Request) -> None:
        """Queue all of `requests`. Raises Busy, and queues none, if there is no room for all.

        Each must fit into the pages there are, prompt and answer, when it is alone.
        """
        if not self.can_submit(len(requests)):
            raise Busy(f"{len(self.waiting)} requests are waiting already: try again later")
        self.waiting.extend(requests)

    def schedule(self) -> list[Scheduled]:
        """The next step's tokens: one of every decoding request, and of prompts in order of admission.

        At most `tokens_per_step` tokens, at least one unless nothing is to be done.
        """
        if not self._make_room():
            self._admit_waiting()
        decoding = [request for request in self.running if request.num_tokens - request.num_computed == 1]
        batch = [Scheduled(request, request.num_computed, 1) for request in decoding]
        budget, scored = self.options.tokens_per_step - len(batch), self.max_scored
        for request in self.running:
            remaining = request.num_tokens - request.num_computed
            if remaining > 1 and budget > 0:
                count = min(remaining, budget)
                if request.num_unscored:  # before these there is only what was scored before a preemption
                    count = min(count, max(0, request.num_scored - request.num_computed) + scored)
                if count:
                    batch.append(Scheduled(request, request.num_computed, count))
                    budget -= count
                    scored -= len(batch[-1].scored)
        return batch

    def update(self, item: Scheduled, token: int | None) -> None:
        """Note that `item` was computed and, if it wanted one, that `token` was sampled; finish if that ends it."""
        request = item.request
        request.num_computed = item.end
        if token is None:
            return
        if request.in_flight or item.end % PAGE == 0:
            self.pages.insert(request)
        request.output.append(token)
        if token in request.params.stop_token_ids and request.params.max_tokens:
            self.finish(request, "stop")
        elif len(request.output) >= request.params.max_tokens:
            self.finish(request, "length")

    def finish(self, request: Request, reason: str) -> None:
        """Take `request` out, wherever it is, and free its pages."""
        if request.state is State.WAITING:
            self.waiting.remove(request)
        elif request.state is State.RUNNING:
            self._stop(request, is_clean=reason != "error" and _is_sampled(request))
        request.state = State.FINISHED
        request.finish_reason = reason

    def _make_room(self) -> bool:
        """Have a page for the next token of every decoding request; whether others had to give theirs back."""
        before = self.num_preemptions
        for request in list(self.running):
            while request.state is State.RUNNING and not self.pages.extend(request):
                self._preempt(self.running[-1])
        return self.num_preemptions > before

    def _preempt(self, request: Request) -> None:
        self._stop(request, is_clean=_is_sampled(request))
        request.state = State.WAITING
        request.num_computed = 0
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _stop(self, request: Request, *, is_clean: bool) -> None:
        self.running.remove(request)
        self.pages.free(request, is_clean=is_clean)

    def _admit_waiting(self) -> None:
        head: Request | None = None  # once it is known that it must wait
        placed = set(self.adapters) if self.waiting else set()
        for request in list(self.waiting):
            if len(self.running) >= self.options.max_rows:
                return
            if head and (head.num_passed >= self.max_passes or head.num_waited > MAX_WAITED):
                return
            if not self._has_place(request.adapter, placed) or self.pages.is_in_flight(request):
                if head is None:
                    head = request
                    head.num_waited += 1
                continue
            # a page for each request that runs, or it would soon be preempted; room is waited for in order
            if not self.pages.allocate(request, spare=len(self.running)):
                return
            self._admit(request)
            if request.adapter is not None:
                placed.add(request.adapter)
            if head:
                head.num_passed += 1

    def _has_place(self, adapter: str | None, placed: set[str]) -> bool:
        """Whether an adapter, if it is one, is ready and has a place among those that are `placed`."""
        if adapter is None:
            return True
        return self.is_ready(adapter) and (adapter in placed or len(placed) < self.options.max_adapters)

    def _admit(self, request: Request) -> None:
        self.waiting.remove(request)
        self.running.append(request)
        request.state = State.RUNNING
        self.num_cached += request.num_computed
        if not request.output:
            request.num_cached = request.num_computed


def _is_sampled(request: Request) -> bool:
    """Whether a token was chosen after all that is computed, whose logits then were finite."""
    return request.num_tokens - request.num_computed == 1
