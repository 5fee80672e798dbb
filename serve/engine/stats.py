"""Stats: what an engine did since it was started."""

from collections.abc import Sequence
from dataclasses import dataclass

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
