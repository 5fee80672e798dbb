"""Stats: what an engine did since it was started; and the Snapshot in which others see it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from serve.adapters.record import Label
from serve.engine.request import Scheduled
from serve.engine.scheduler import Scheduler


@dataclass
class Stats:
    """Counts since the start; the last two are the largest seen in one step."""

    num_steps: int = 0
    num_tokens: int = 0  # computed, prompts included
    num_cached: int = 0  # not computed, because another request had computed the same
    num_sampled: int = 0
    num_preemptions: int = 0
    num_failed_steps: int = 0
    max_rows: int = 0
    max_adapters: int = 0

    def note(self, batch: Sequence[Scheduled], scheduler: Scheduler) -> None:
        """Count a step that computed `batch`."""
        self.num_steps += 1
        self.num_tokens += sum(item.num_tokens for item in batch)
        self.num_sampled += sum(item.wants_token for item in batch)
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
