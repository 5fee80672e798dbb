"""Which tokens of which requests run in the next step: continuous batching with chunked prefill. No torch.

Requests are admitted by priority, those of one first come, first served; whoever waits rises, so that nobody waits for
ever. While the head of the queue waits for a place among the batch's adapters, or for a page that another request
computes, others may pass it, a bounded number for a bounded time. When pages run out, the least urgent request that
was admitted last gives back its own and goes to the head of the queue, to be computed again. How a step is divided
among prompts is in `shares`.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile

from serve.engine.options import EngineOptions
from serve.engine.pages import PAGE, PagePool
from serve.engine.request import HIGH, Request, Scheduled, State
from serve.engine.shares import divide
from serve.engine.speculate import MAX_DRAFT, Costs
from serve.errors import Busy

MAX_WAITED = 256  # steps in which others may pass the head of the queue
RISE = 256  # steps after which a request is as urgent as one of the next priority


class Scheduler:
    """The waiting queue and the running requests.

    `is_ready`: whether an adapter is where a batch can use it; `pinned`: adapters whose places are theirs even if no
    request runs. `max_scored`: tokens of prompts in one step whose log-probabilities are wanted, None: all of a step.
    `costs` of steps, by which it is decided whether a guess is worth it; None: nothing is guessed.
    """

    def __init__(
        self,
        options: EngineOptions,
        pages: PagePool,
        is_ready: Callable[[str], bool] = lambda _: True,
        pinned: Callable[[], frozenset[str]] = frozenset,
        max_scored: int | None = None,
        costs: Costs | None = None,
    ) -> None:
        self.options = options
        self.pages = pages
        self.is_ready = is_ready
        self.pinned = pinned
        self.max_scored = options.tokens_per_step if max_scored is None else max_scored
        self.costs = costs
        self.max_passes = 4 * options.max_rows
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_cached = 0  # tokens that were not computed because their pages were known

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def adapters(self) -> frozenset[str]:
        """The adapters of the running requests, and those that are pinned."""
        return self.pinned() | {request.adapter for request in self.running if request.adapter is not None}

    def wanted(self) -> dict[str, None]:
        """Adapters that should be in slots: of running requests, pinned, and of waiting ones in their order."""
        wanted = dict.fromkeys(self.adapters)
        for request in self.queue:
            if len(wanted) >= self.options.max_adapters:
                break
            if request.adapter is not None:
                wanted[request.adapter] = None
        return wanted

    @property
    def queue(self) -> list[Request]:
        """The waiting requests, the most urgent first; of one urgency in the order in which they came."""
        return sorted(self.waiting, key=self._urgency, reverse=True)

    def can_submit(self, count: int = 1) -> bool:
        return len(self.waiting) + count <= self.options.queue_limit

    def submit(self, *requests: Request) -> None:
        """Queue all of `requests`. Raises Busy, and queues none, if there is no room for all.

        Each must fit into the pages there are, prompt and answer, when it is alone.
        """
        if not self.can_submit(len(requests)):
            raise Busy(f"{len(self.waiting)} requests are waiting already: try again later")
        for request in requests:
            request.since = self.num_steps
        self.waiting.extend(request for request in requests if not request.output)
        ahead = sum(1 for _ in takewhile(lambda each: each.output, self.waiting))
        for place, request in enumerate((each for each in requests if each.output), ahead):
            self.waiting.insert(place, request)  # somebody reads those already

    def schedule(self) -> list[Scheduled]:
        """The next step's tokens: one of every decoding request, the rest divided among prompts.

        At most `tokens_per_step` tokens, at least one unless nothing is to be done.
        """
        self.num_steps += 1
        if not self._make_room():
            self._admit_waiting()
        answers = [each for each in self.running if each.is_decoding]
        prompts = [each for each in self.running if not each.is_decoding]
        parts = self._divide(prompts, self.options.tokens_per_step - len(answers), is_awaited=bool(answers))
        room = self.options.tokens_per_step - len(answers) - sum(item.num_tokens for item in parts)
        return self._guess(answers, room) + parts

    def _divide(self, prompts: list[Request], budget: int, *, is_awaited: bool) -> list[Scheduled]:
        max_part = self.options.max_part
        return divide(prompts, budget, max_part=max_part, max_scored=self.max_scored, is_awaited=is_awaited)

    def _guess(self, answers: list[Request], room: int) -> list[Scheduled]:
        """The next token of every answer, and guesses at those after it, `room` in all."""
        batch, num_tokens, price = [], len(answers), 0.0
        if self.costs is not None:
            price = self.costs.price(num_tokens)
        for request in answers:
            most = min(room, request.params.max_tokens - len(request.output) - 1, MAX_DRAFT)
            draft: tuple[int, ...] = ()
            if self.costs is not None and most > 0:
                forced = request.form.forced(request.output) if request.form is not None else ()
                draft = request.drafter.draft(request.prompt, request.output, forced, most, price)
                if not self.pages.extend(request, len(draft), spare=len(self.running)):
                    draft = draft[: len(request.pages) * PAGE - request.num_tokens]
                if draft:
                    room, num_tokens = room - len(draft), num_tokens + len(draft)
                    price = self.costs.price(num_tokens)
            batch.append(Scheduled(request, request.num_computed, 1 + len(draft), draft))
        return batch

    def update(self, item: Scheduled, tokens: Sequence[int]) -> None:
        """Note that `item` was computed and, if it wanted any, that `tokens` were sampled; finish if these end it."""
        request, before = item.request, item.request.num_computed
        num_kept = max(0, len(tokens) - 1)
        request.num_computed = item.end - len(item.draft) + num_kept
        if not tokens:
            return
        request.drafter.note(len(item.draft), num_kept)
        request.output += tokens
        if request.in_flight or request.num_computed // PAGE > before // PAGE:
            self.pages.insert(request)
        if tokens[-1] in request.params.stop_token_ids and request.params.max_tokens:
            self.finish(request, "stop")
        elif len(request.output) >= request.params.max_tokens:
            self.finish(request, "length")

    def finish(self, request: Request, reason: str) -> None:
        """Take `request` out, wherever it is, and free its pages."""
        if request.state is State.WAITING:
            self.waiting.remove(request)
        elif request.state is State.RUNNING:
            self._stop(request, is_clean=reason != "error" and request.is_decoding)
        request.state = State.FINISHED
        request.finish_reason = reason

    def _make_room(self) -> bool:
        """Have a page for the next token of every decoding request; whether others had to give theirs back."""
        before = self.num_preemptions
        for request in list(self.running):
            while request.state is State.RUNNING and not self.pages.extend(request):
                self._preempt(min(reversed(self.running), key=self._urgency))
        return self.num_preemptions > before

    def _preempt(self, request: Request) -> None:
        self._stop(request, is_clean=request.is_decoding)
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
        for request in self.queue:
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

    def _urgency(self, request: Request) -> int:
        """Its priority, and one more after each RISE steps; at most the highest there is."""
        return min(HIGH, request.priority + (self.num_steps - request.since) // RISE)

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
        if request.begun is None:
            request.begun = time.monotonic()
        if not request.output:
            request.num_cached = request.num_computed
