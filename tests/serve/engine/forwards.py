"""Batches for a runner, and the logits that the model's own code gives for them."""

from collections.abc import Sequence

import torch

from serve.engine.engine import Engine
from serve.engine.request import Request, SamplingParams, Scheduled
from serve.lora.product import Slot

PARAMS = SamplingParams(max_tokens=1)


def plain(engine: Engine, batch: Sequence[Scheduled], slots: dict[str, Slot]) -> torch.Tensor:
    """The logits as the model itself computes them, neither by the lean forward nor by the fused step."""
    runner = engine.runner
    lean, fused = runner.lean, runner.fused
    runner.lean = runner.fused = None
    try:
        return runner.forward(batch, slots)
    finally:
        runner.lean, runner.fused = lean, fused


def fill(engine: Engine, rows: list[tuple[int, int, str | None]]) -> list[Scheduled]:
    """Rows (places before, new tokens, adapter), whose places before are in the cache."""
    batch, page = [], 1
    for number, (before, count, adapter) in enumerate(rows):
        tokens = torch.randint(3, 250, (before + count,), generator=torch.Generator().manual_seed(number)).tolist()
        pages = list(range(page, page + (before + count) // 16 + 1))
        page += len(pages)
        row = Request(str(number), tuple(tokens), PARAMS, adapter, pages=pages)
        if before:
            plain(engine, [Scheduled(row, 0, before)], engine.slots.find([adapter] if adapter else []))
        batch.append(Scheduled(row, before, count))
    return batch
