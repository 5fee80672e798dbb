"""A replica of the simulated fleet: the server's own scheduler, pages, pool and slots, in a time that is counted.

What is real is every decision: which tokens a step computes, who is admitted, which adapter leaves memory or a slot for
another. What is a model is how long things take, and that the tokens mean nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.fleet_model import Asked, Costs, Shape, Tally
from serve.adapters.pool import AdapterPool
from serve.adapters.reader import AdapterReader
from serve.adapters.source import Source
from serve.adapters.stacked import StackedSlots
from serve.engine.options import EngineOptions
from serve.engine.pages import PagePool, pages_for
from serve.engine.request import Request, SamplingParams, Scheduled, State
from serve.engine.scheduler import Scheduler
from serve.errors import Busy
from serve.lora.linear import LinearGroup, LoraContext, MultiLoraLinear
from serve.lora.product import Factors

RANK = 1
# the factors of each adapter: of the one layer there is. How many bytes an adapter has is the model's affair
FACTORS: Factors = {"x": (torch.zeros(1, RANK), torch.zeros(RANK, 1))}
FACTOR_BYTES = sum(tensor.nbytes for tensor in FACTORS["x"])


class Reader(AdapterReader):
    """Reads nothing: factors are the same small ones, whatever the source."""

    def __init__(self) -> None:
        pass

    def check(self, source: Source) -> None:
        """Everything fits."""

    def read(self, source: Source) -> Factors:
        """See AdapterReader."""
        return {name: tuple(tensor.clone() for tensor in own) for name, own in FACTORS.items()}

    def placed(self, factors: Factors) -> Factors:
        """As they are."""
        return factors


@dataclass(frozen=True)
class Stored:
    """An adapter, where a source is wanted."""

    content_digest: str
    name: str = "adapter"


@dataclass(eq=False)
class Replica:
    """One replica. `at` schedules a call at a given time; `done` is called with each request that has ended."""

    name: str
    shape: Shape
    costs: Costs
    at: Callable[[float, Callable[[float], None]], None]
    done: Callable[[Asked, float], None]
    digests: list[str]
    on_disk: set[int] = field(default_factory=set)
    num_running: int = 0
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        shape = self.shape
        options = EngineOptions(
            max_rows=shape.requests, max_adapters=shape.slots, tokens_per_step=shape.step_tokens, speculation="off"
        )
        self.pool = AdapterPool(Reader(), max_bytes=shape.memory * FACTOR_BYTES, max_pins=0)
        linear = nn.Linear(1, 1, bias=False)
        layers = {"x": MultiLoraLinear(linear, LinearGroup([linear], LoraContext()), 0)}
        self.slots = StackedSlots(layers, torch.float32, torch.device("cpu"), shape.slots, self.pool.records)
        self.pages = PagePool(pages_for(shape.kv_tokens))
        self.scheduler = Scheduler(options, self.pages, self.slots.__contains__)
        self._asked: dict[Request, Asked] = {}
        self._reading: dict[int, list[Asked]] = {}
        self._link = 0.0  # when what comes from the remote is through
        self._filling: str | None = None
        self._batch: list[Scheduled] | None = None
        self._begun, self._each, self._most, self._turn = 0.0, 0.0, 0, 0

    @property
    def is_full(self) -> bool:
        return self.num_running >= self.shape.requests

    def has(self, adapter: int) -> bool:
        """Whether an adapter is in memory."""
        return self.digests[adapter] in self.pool

    def hold(self, adapter: int) -> None:
        """Have an adapter in memory and on disk from the start."""
        self.on_disk.add(adapter)
        self.pool.acquire(self._source(adapter))
        self.pool.release(self.digests[adapter])

    def send(self, asked: Asked, now: float) -> None:
        """Take a request; its adapter is read first, if need be."""
        self.num_running += 1
        asked.is_warm = self.has(asked.adapter)
        if asked.is_warm:
            self._submit(asked, now)
        elif asked.adapter in self._reading:
            self._reading[asked.adapter].append(asked)
        else:
            self._reading[asked.adapter] = [asked]
            ready = now
            if asked.adapter not in self.on_disk:
                self._link = max(self._link, now) + self.shape.adapter_bytes / self.costs.bandwidth
                ready = self._link + self.costs.remote
                self.tally.num_brought += 1
            self.tally.num_read += 1
            self.at(ready + self.costs.read, lambda then: self._is_read(asked.adapter, then))

    def _is_read(self, adapter: int, now: float) -> None:
        self.on_disk.add(adapter)
        for asked in self._reading.pop(adapter):
            self._submit(asked, now)

    def _submit(self, asked: Asked, now: float) -> None:
        digest = self.digests[asked.adapter]
        params = SamplingParams(asked.num_answer, temperature=0.0)
        request = Request(str(asked.number), (0,) * asked.num_prompt, params, digest)
        try:
            self.pool.acquire(self._source(asked.adapter), is_request=True)
        except Busy:
            return self._leave(asked, now, "memory")
        try:
            self.scheduler.submit(request)
        except Busy:
            self.pool.release(digest)
            return self._leave(asked, now, "queue")
        self._asked[request] = asked
        self._wake(now)
        return None

    def _wake(self, now: float) -> None:
        """Something is new: fill slots, and end a run of equal steps with the one that is being computed."""
        self._fill(now)
        if self._batch is None:
            self._begin(now)
        elif self._most > 1:
            self._most = min(self._most, max(1, -int(-(now - self._begun) // self._each)))
            self._end_at(self._begun + self._most * self._each)

    def _begin(self, now: float) -> None:
        """Begin a step; several at once, if nothing could change between them."""
        batch = self.scheduler.schedule() if self.scheduler.has_work else []
        if not batch:
            return
        adapters = {item.request.adapter for item in batch if item.request.adapter is not None}
        self.slots.find(adapters)
        answers = [item for item in batch if item.request.is_decoding]
        num_prompt = sum(item.num_tokens for item in batch) - len(answers)
        costs = self.costs
        self._each = (
            costs.step + costs.row * len(batch) + costs.adapter * len(adapters) + costs.prompt_token * num_prompt
        )
        self._batch, self._begun, self._most = batch, now, 1
        if len(answers) == len(batch) and not self.scheduler.waiting:
            self._most = min(item.request.params.max_tokens - len(item.request.output) for item in batch)
            if len(batch) * pages_for(self._most) + len(batch) > self.pages.num_available:
                self._most = 1
        self._end_at(now + self._most * self._each)

    def _end_at(self, time: float) -> None:
        self._turn += 1
        turn = self._turn
        self.at(time, lambda now: self._end(now) if turn == self._turn else None)

    def _end(self, now: float) -> None:
        assert self._batch is not None
        batch, count = self._batch, self._most
        self._batch = None
        self.tally.busy += count * self._each
        self.tally.row_seconds += count * self._each * len(batch)
        self.tally.num_steps += count
        self.scheduler.num_steps += count - 1
        for item in batch:
            request, tokens = item.request, [0] * count if item.wants_token else []
            if count > 1:  # as if all but the first had been guessed, and rightly
                has_room = self.pages.extend(request, count - 1)
                assert has_room, "room was made sure of"
                item = Scheduled(request, item.start, count, (0,) * (count - 1))
            self.scheduler.update(item, tokens)
            self._note(request, len(tokens), now)
        self._fill(now)
        self._begin(now)

    def _note(self, request: Request, num_tokens: int, now: float) -> None:
        asked = self._asked[request]
        asked.tokens += num_tokens
        self.tally.num_tokens += num_tokens
        if num_tokens and asked.first is None:
            asked.first = now
        if request.state is State.FINISHED:
            del self._asked[request]
            self.pool.release(self.digests[asked.adapter])
            self._leave(asked, now)

    def _leave(self, asked: Asked, now: float, why: str | None = None) -> None:
        self.num_running -= 1
        asked.ended, asked.why = now, why
        self.done(asked, now)

    def _fill(self, now: float) -> None:
        """Begin to copy the next wanted adapter into a slot, one at a time, as the loader's thread does."""
        if self._filling is not None or not self.scheduler.waiting:
            return
        wanted = self.scheduler.wanted()
        for digest in wanted:
            if digest not in self.slots:
                if self.slots.make_room(FACTORS, set(wanted)):
                    self._filling = digest
                    self.at(now + self.costs.slot, self._is_filled)
                return

    def _is_filled(self, now: float) -> None:
        digest, self._filling = self._filling, None
        assert digest is not None
        wanted = set(self.scheduler.wanted()) | {digest}
        if self.slots.make_room(FACTORS, wanted):
            self.slots.put(digest, self.pool.get(digest), wanted)
        self._wake(now)

    def _source(self, adapter: int) -> Source:
        return Stored(self.digests[adapter])  # type: ignore[return-value]
