"""Runner: packs the scheduled tokens into one row, runs the model once and returns the logits that are needed."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.utils.hooks import RemovableHandle

from adapterhub_local.base.attention import AttentionKind
from adapterhub_local.base.model import BaseModel
from adapterhub_local.cores import Cores
from serve.engine.cache import KVCache
from serve.engine.fused import FusedStep
from serve.engine.graphs import Graphs
from serve.engine.lean import LeanForward
from serve.engine.packed import Group, PackedBatch, Row
from serve.engine.pages import pages_for
from serve.engine.request import Scheduled
from serve.lora.linear import LoraContext
from serve.lora.product import Segment, Slot

# Up to this many places, padding included, one batched product is faster than one product an adapter.
MAX_GRID = 128


class Runner:
    """The model with its KV cache. Which adapter sits in which slot is given with every batch."""

    def __init__(
        self,
        model: BaseModel,
        cache: KVCache,
        context: LoraContext,
        graphs: Graphs | None = None,
        fused: FusedStep | None = None,
        lean: LeanForward | None = None,
        cores: Cores | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.context = context
        self.graphs = graphs
        self.fused = fused
        self.lean = lean
        self.cores = cores
        self.kinds: dict[int, AttentionKind] = {}  # what each layer's attention does, learnt in its first step
        self.hidden: torch.Tensor | None = None  # (n, hidden size) behind the last logits, if an embedding is wanted
        self._copied: list[Group] = []  # what the last step has wanted_places copies of
        self.device = model.get_input_embeddings().weight.device

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels that are in use."""
        names = self.context.kernels.names if self.context.kernels is not None else []
        whole = [name for name, each in (("step", self.fused), ("lean", self.lean)) if each is not None]
        return [*names, *whole]

    def resume(self) -> None:
        """Steps come again after a rest."""
        if self.cores is not None:
            self.cores.resume()

    @torch.inference_mode()
    def forward(self, batch: Sequence[Scheduled], slots: Mapping[str, Slot]) -> torch.Tensor:
        """Logits (n, vocabulary), float32, of each item after the tokens that are scored, and where one may be chosen.

        Items with the same adapter must be neighbours (`in_segments`).
        """
        segments = _segments(batch, slots, [item.num_tokens for item in batch])
        self.hidden = None
        wants_hidden = any(item.request.params.pooling for item in batch)
        if self.graphs is not None and not wants_hidden:
            replayed = self.graphs.forward(batch, segments)
            if replayed is not None:
                return replayed
        ends = list(_ends(batch))
        counts = [len(item.scored) + item.num_choices for item in batch]
        wanted_places = [
            place for item, end in zip(batch, ends, strict=True) for place in _logit_places(item, end - item.num_tokens)
        ]
        self._copied = []  # nothing is known of a step that failed
        self.cache.reserve(max(max(item.request.pages[: pages_for(item.end)]) for item in batch))
        if self.fused is not None and not wants_hidden:
            fused = self.fused.forward(batch, segments, wanted_places)
            if fused is not None:
                return fused
        packed = self._pack(batch, ends)
        wanting = _segments(batch, slots, counts)
        seen: list[torch.Tensor] = []  # what the output head gets
        hook = self._watch_states(seen) if wants_hidden else None
        self.context.begin(segments, wanting, self.device, MAX_GRID)
        try:
            tokens = [token for item in batch for token in item.tokens]
            # a step of prompt chunks alone wants no logits; those of one token are computed and dropped
            ids, kept = self._tensor(tokens), self._tensor(wanted_places or [0])
            logits: torch.Tensor = (
                self.lean(ids, packed, kept)
                if self.lean is not None and not wants_hidden
                else self._plain(ids, packed, kept)
            )
        finally:
            self.context.end()
            if hook is not None:
                hook.remove()
        if wants_hidden:
            self.hidden = seen[0][0, wanted_places]
        if self.cache.max_copied:
            self._copied = [group for group, _ in packed.decode_groups if group.copy_index is not None]
        return logits[: len(wanted_places)].float()

    def _plain(self, tokens: torch.Tensor, packed: PackedBatch, places: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocabulary) at `places`, by the model's own code."""
        logits: torch.Tensor = self.model(
            input_ids=tokens[None],
            position_ids=packed.positions[None],
            use_cache=False,
            logits_to_keep=places,
            packed=packed,
        ).logits
        return logits[0]

    def _watch_states(self, seen: list[torch.Tensor]) -> RemovableHandle:
        """Have `seen` hold the last hidden states (1, tokens, hidden size), as the output head gets them."""
        body: torch.nn.Module = self.model.base_model
        return body.register_forward_hook(lambda _, __, outputs: seen.append(outputs[0]))

    def _pack(self, batch: Sequence[Scheduled], ends: Sequence[int]) -> PackedBatch:
        rows = [
            Row(end - item.num_tokens, end, item.start, tuple(item.request.pages[: pages_for(item.end)]))
            for item, end in zip(batch, ends, strict=True)
        ]
        positions = [position for item in batch for position in range(item.start, item.end)]
        kernels = self.context.kernels
        in_place = kernels if kernels is not None and kernels.has("paged_attention") else None
        return PackedBatch(self.cache, rows, self._tensor(positions), in_place, self._copied, self.kinds)

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)


def _segments(batch: Sequence[Scheduled], slots: Mapping[str, Slot], counts: Sequence[int]) -> list[Segment]:
    """Segments of neighbours with the same adapter, `counts` tokens an item."""
    segments: list[Segment] = []
    end = 0
    for item, count in zip(batch, counts, strict=True):
        end += count
        if item.request.adapter is None or count == 0:
            continue
        slot = slots[item.request.adapter]
        if segments and segments[-1].slot == slot:
            segments[-1] = Segment(segments[-1].start, end, slot)
        else:
            segments.append(Segment(end - count, end, slot))
    return segments


def _logit_places(item: Scheduled, start: int) -> list[int]:
    """Places in the batch, where the item begins at `start`, after which logits are needed."""
    places = [start + position - item.start for position in item.scored]
    end = start + item.num_tokens
    return [*places, *range(end - item.num_choices, end)]


def in_segments(batch: Sequence[Scheduled], slots: Mapping[str, Slot]) -> list[Scheduled]:
    """The batch in the order of its slots, those without one last: neighbours in memory are neighbours in the batch."""

    def key(item: Scheduled) -> tuple[bool, int, int]:
        slot = None if item.request.adapter is None else slots[item.request.adapter]
        return (True, 0, 0) if slot is None else (False, slot.rank, slot.index)

    return sorted(batch, key=key)


def _ends(batch: Sequence[Scheduled]) -> Iterator[int]:
    end = 0
    for item in batch:
        end += item.num_tokens
        yield end
