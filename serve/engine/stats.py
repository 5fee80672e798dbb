"""Stats: what an engine did since it was started; and the Snapshot in which others see it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from serve.adapters.record import Label
from serve.engine.request import Request, Scheduled
from serve.engine.scheduler import Scheduler

if TYPE_CHECKING:
    from serve.engine.engine import Engine


@dataclass
class Stats:
    """Counts since the start; the last two are the largest seen in one step."""

    num_steps: int = 0
    num_tokens: int = 0  # computed, prompts included
    num_cached: int = 0  # not computed, because another request had computed the same
    num_sampled: int = 0
    num_drafted: int = 0  # tokens that were guessed, and computed with the newest of their answers
    num_accepted: int = 0  # of these, those that were right
    num_preemptions: int = 0
    num_failed_steps: int = 0
    max_rows: int = 0
    max_adapters: int = 0

    def note(
        self, batch: Sequence[Scheduled], num_sampled: Mapping[str, int], scheduler: Scheduler, num_failed: int
    ) -> None:
        """Count a step that computed `batch` and gave this many tokens by request; `num_failed` have failed so far."""
        self.num_failed_steps = num_failed
        self.num_steps += 1
        self.num_tokens += sum(item.num_tokens for item in batch)
        self.num_drafted += sum(len(item.draft) for item in batch)
        self.num_accepted += sum(max(0, num_sampled[item.request.id] - 1) for item in batch)
        self.num_sampled += sum(num_sampled.values())
        self.num_cached = scheduler.num_cached
        self.num_preemptions = scheduler.num_preemptions
        self.max_rows = max(self.max_rows, len(batch))
        self.max_adapters = max(self.max_adapters, len({item.request.adapter for item in batch} - {None}))


@dataclass(frozen=True)
class Snapshot:
    """An engine at one moment. Memory is in bytes; `kv_usage` is the share of the KV cache's pages that are in use."""

    kv_usage: float
    adapter_loads: int  # read from files since the start
    adapter_evictions: int
    slots_used: int
    slots_total: int
    slot_bytes: int
    running: int  # requests in the batch
    waiting: int
    adapters_loaded: int
    adapter_bytes: int
    kv_bytes: int
    kernels: tuple[str, ...]  # of our own, in use
    cuda_graphs: int
    prefix_bytes: int
    stats: Stats
    running_adapters: tuple[Label, ...] = ()
    waiting_adapters: tuple[Label, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What /health says of it: no names, which are not for everybody."""
        fields = asdict(self)
        for name in ("stats", "running_adapters", "waiting_adapters"):
            del fields[name]
        return fields | asdict(self.stats)


def take_snapshot(engine: "Engine", running: Sequence[Request], waiting: Sequence[Request]) -> Snapshot:
    """The engine as it is, under its lock."""
    pool, slots, pages, runner = engine.pool, engine.slots, engine.pages, engine.runner

    def labels(requests: Sequence[Request]) -> tuple[Label, ...]:
        """The adapters of these requests, each as it was asked for first."""
        digests = {each.adapter for each in requests if each.adapter is not None}
        return tuple(sorted(pool.records[digest].label for digest in digests))

    return Snapshot(
        kv_usage=pages.num_used / pages.num_pages,
        adapter_loads=pool.num_loads,
        adapter_evictions=pool.num_evictions,
        slots_used=len(slots),
        slots_total=engine.options.max_adapters,
        slot_bytes=slots.num_bytes,
        running=len(running),
        waiting=len(waiting),
        adapters_loaded=len(pool),
        adapter_bytes=pool.num_bytes,
        kv_bytes=runner.cache.num_bytes,
        kernels=tuple(runner.kernels),
        cuda_graphs=len(runner.graphs or ()),
        prefix_bytes=pages.num_idle * runner.cache.page_bytes,
        stats=replace(engine.stats),
        running_adapters=labels(running),
        waiting_adapters=labels(waiting),
    )
