"""Judged answers cut into rows: several items in one where that is exact, each with its prompt computed once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterhub_local.base.model import AdaptedModel
from adapterhub_local.rows.example import Example
from adapterhub_local.rows.judged import Judged, cut_items
from adapterhub_local.rows.packing import Packed, is_exact_row, pack, pack_groups
from adapterhub_local.train.loss import Head, answer_log_probs, output_head


@dataclass(frozen=True)
class JudgedRow:
    """Items that are computed together. `packs` hold, in order, the parts that gradients flow through."""

    items: tuple[Judged, ...]
    packs: tuple[Packed, ...]
    others: tuple[Packed, ...] = ()  # parts without gradients

    @property
    def num_tokens(self) -> int:
        return sum(pack.num_tokens for pack in (*self.packs, *self.others))

    @property
    def numbers(self) -> list[int]:
        return [item.number for item in self.items]


class Cutter:
    """How this model's batches are cut: groups of parts together, each group alone, or each part alone.

    learned: how many of an item's parts gradients flow through; the rest is computed without.
    """

    def __init__(self, model: AdaptedModel, items: Sequence[Judged], learned: int, tokens: int, size: int) -> None:
        self.model, self.learned, self.tokens, self.size = model.eval(), learned, tokens, size
        self.share = not any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
        self.head: Head | None = output_head(self.model, items[0].parts[0])
        longest = max(items, key=lambda item: sum(len(part.ids) for part in item.parts))
        probes = [self._group(item) for item in (*items[:2], longest)]
        flat = [example for group in probes for example in group]
        self.is_grouped = size > 1 and is_exact_row(model, flat, pack_groups(probes, share=self.share))
        self.is_paired = self.is_grouped or (
            learned > 1 and is_exact_row(model, probes[-1], pack(probes[-1], share=self.share))
        )

    def cut(self, batch: Sequence[Judged]) -> list[JudgedRow]:
        """The rows of a batch."""
        size = self.size if self.is_grouped else 1
        return [self._row(row) for row in cut_items(batch, self.tokens, size, self.learned, share=self.share)]

    def _group(self, item: Judged) -> list[Example]:
        return list(item.parts[: self.learned])

    def _row(self, items: Sequence[Judged]) -> JudgedRow:
        groups = [self._group(item) for item in items]
        others = [[part] for item in items for part in item.parts[self.learned :]]
        return JudgedRow(tuple(items), self._packs(groups), self._packs(others))

    def _packs(self, groups: Sequence[Sequence[Example]]) -> tuple[Packed, ...]:
        if self.is_grouped and groups:
            return (pack_groups(groups, share=self.share),)
        if self.is_paired:
            return tuple(pack(group, share=self.share) for group in groups)
        return tuple(pack([example]) for group in groups for example in group)

    def log_probs(self, packs: Sequence[Packed], parts: int) -> torch.Tensor:
        """(items, parts) float32 nats of what `packs` hold, with gradients where they are on."""
        found = [answer_log_probs(self.model, one, self.head, int(one.segments.max())) for one in packs]
        return torch.cat(found).view(-1, parts)
