"""MultiLoraLinear: a linear layer of the base that adds to every token the delta of its own adapter.

Layers that are given the same tensor (query, key and value; gate and up) are computed together, once.
"""

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from adapterhub_local.base.model import BaseModel, Modules
from serve.kernels.choose import Kernels
from serve.lora.experts import shared_inputs_of_experts
from serve.lora.product import (
    InPlace,
    LoraBatch,
    Segment,
    add_by_grid,
    add_by_segment,
    batch_in_place,
    lora_batch,
    tiled_batch,
)
from serve.lora.rows import look_up, make_logits

# x (..., in_features) -> W x of each of some layers
Product = Callable[[torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class ScaledTokens:
    """Tokens (n,) whose adapters rescale the rows of the base's weights, and their places (n,) in a rank's stack."""

    rank: int
    tokens: torch.Tensor
    places: torch.Tensor


@dataclass
class LoraContext:
    """The batch being computed, set by the runner before a forward pass and read by all wrapped layers.

    `logits` is the same for the layer that makes logits, which sees only the tokens that need some. `scaled_tokens` and
    `scaled_logits` are the tokens of adapters with DoRA, `own_tokens` and `own_logits` those of adapters with rows of
    the embeddings. `kernels`, if there are any, compute the batch's tiles.
    """

    tokens: LoraBatch | None = None
    logits: LoraBatch | None = None
    kernels: Kernels | None = None
    scaled_tokens: tuple[ScaledTokens, ...] = ()
    scaled_logits: tuple[ScaledTokens, ...] = ()
    own_tokens: tuple[Segment, ...] = ()
    own_logits: tuple[Segment, ...] = ()
    segments: tuple[Segment, ...] = ()
    device: torch.device | None = None
    max_grid: int = 0

    def begin(self, tokens: Sequence[Segment], logits: Sequence[Segment], device: torch.device, max_grid: int) -> None:
        """Note which tokens of the batch have which adapter, and the same of the tokens that need logits."""
        self.segments, self.device, self.max_grid = tuple(tokens), device, max_grid
        self.tokens, self.logits = self._batch(tokens), self._batch(logits)
        self.scaled_tokens, self.scaled_logits = (_scaled_tokens(each, device) for each in (tokens, logits))
        self.own_tokens, self.own_logits = (
            tuple(each for each in some if each.slot.rows is not None) for some in (tokens, logits)
        )

    def _batch(self, segments: Sequence[Segment]) -> LoraBatch | None:
        assert self.device is not None
        if segments and segments[0].slot.parts is not None:
            return batch_in_place(segments, has_kernel=self.kernels is not None and self.kernels.has("add_parts"))
        if self.kernels is not None and self.kernels.has("add_lora"):
            return tiled_batch(segments, self.device)
        return lora_batch(segments, self.device, self.max_grid)

    @contextmanager
    def only(self, tokens: Sequence[int]) -> Iterator[None]:
        """For as long as the block, layers are given these tokens of the batch alone, whose places ascend."""
        before = self.tokens, self.scaled_tokens
        cut = ((bisect_left(tokens, each.start), bisect_left(tokens, each.end), each.slot) for each in self.segments)
        segments = [Segment(start, end, slot) for start, end, slot in cut if start < end]
        assert self.device is not None
        self.tokens, self.scaled_tokens = self._batch(segments), _scaled_tokens(segments, self.device)
        try:
            yield
        finally:
            self.tokens, self.scaled_tokens = before

    def replay(self, batch: LoraBatch | None) -> None:
        """Note a batch whose tensors are there already, one token a row, all of which need logits."""
        self.tokens = self.logits = batch

    def end(self) -> None:
        """The batch is computed."""
        self.tokens = self.logits = None
        self.scaled_tokens = self.scaled_logits = ()
        self.own_tokens = self.own_logits = self.segments = ()


def _scaled_tokens(segments: Sequence[Segment], device: torch.device) -> tuple[ScaledTokens, ...]:
    by_rank: dict[int, list[tuple[int, int]]] = {}
    for segment in segments:
        if segment.slot.is_scaled and segment.slot.parts is None:
            pairs = ((token, segment.slot.index) for token in range(segment.start, segment.end))
            by_rank.setdefault(segment.slot.rank, []).extend(pairs)
    return tuple(
        ScaledTokens(rank, *torch.tensor(pairs, device=device).unbind(1)) for rank, pairs in sorted(by_rank.items())
    )


class LinearGroup:
    """Layers with one input: their base products, and the stacked factors of all slots.

    `a`: rank -> (slots, in_features, layers * rank); `b`: for each layer rank -> (slots, rank, out_features); `scales`:
    for each layer rank -> (slots, out_features), by how much more than once W x counts (DoRA, else 0). A rank is
    missing where no adapter of that rank has the layer, or has DoRA there; adapters in place are in none of them.
    `dense` computes the base products of `min_tokens` to `max_tokens` in another way than the layers do themselves.
    """

    def __init__(self, bases: Sequence[nn.Linear], context: LoraContext, *, makes_logits: bool = False) -> None:
        self.bases = list(bases)
        self.context = context
        self.makes_logits = makes_logits
        self.dense: Product | None = None
        self.min_tokens, self.max_tokens = 1, sys.maxsize
        self.a: dict[int, torch.Tensor] = {}
        self.b: list[dict[int, torch.Tensor]] = [{} for _ in bases]
        self.scales: list[dict[int, torch.Tensor]] = [{} for _ in bases]
        self._x: torch.Tensor | None = None  # the input whose outputs are held for layers that have not asked yet
        self._outs: dict[int, torch.Tensor] = {}

    @property
    def in_features(self) -> int:
        return self.bases[0].in_features

    @property
    def sizes(self) -> list[int]:
        """out_features of each layer."""
        return [base.out_features for base in self.bases]

    @property
    def is_plain(self) -> bool:
        """Whether the layers alone do all that is to be done now: nothing is shared, nothing added."""
        if self.dense is not None:
            return False
        return (self.context.logits if self.makes_logits else self.context.tokens) is None

    def output(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """What layer number `place` makes of x (..., in_features)."""
        if self._x is not x or place not in self._outs:
            self._x, self._outs = x, dict(enumerate(self._compute(x)))
        out = self._outs.pop(place)
        if not self._outs:
            self._x = None
        return out

    def base_products(self, x: torch.Tensor) -> list[torch.Tensor]:
        """W x of each layer."""
        tokens = x.numel() // x.shape[-1]
        if self.dense is not None and self.min_tokens <= tokens <= self.max_tokens:
            return self.dense(x)
        return [base(x) for base in self.bases]

    def _compute(self, x: torch.Tensor) -> list[torch.Tensor]:
        outs = self.base_products(x)
        batch = self.context.logits if self.makes_logits else self.context.tokens
        if self.makes_logits:
            self._use_own_rows(outs[0], x)
        if batch is None or not (self.a or batch.in_place):
            return outs
        flat_x = x.reshape(-1, x.shape[-1])
        flat_outs = [out.view(-1, out.shape[-1]) for out in outs]
        if batch.in_place is not None:
            self._add_in_place(flat_outs, flat_x, batch.in_place)
        for scaled in self.context.scaled_logits if self.makes_logits else self.context.scaled_tokens:
            self._rescale(flat_outs, scaled)  # before anything is added to what is W x
        for grid in batch.grids:
            if grid.rank in self.a:
                add_by_grid(flat_outs, flat_x, self.a[grid.rank], [b.get(grid.rank) for b in self.b], grid)
        for segment in batch.segments:
            rank = segment.slot.rank
            if rank in self.a:
                add_by_segment(flat_outs, flat_x, self.a[rank], [b.get(rank) for b in self.b], segment)
        for tiles in batch.tiles:
            if tiles.rank in self.a:
                assert self.context.kernels is not None
                bs = [b.get(tiles.rank) for b in self.b]
                self.context.kernels.add_lora(flat_outs, flat_x, self.a[tiles.rank], bs, tiles.table)
        return outs

    def _add_in_place(self, outs: Sequence[torch.Tensor], x: torch.Tensor, batch: InPlace) -> None:
        """out += what the adapters add that lie in their own memory."""
        biases = [base.bias for base in self.bases]
        for segment in batch.segments:
            part = segment.slot.parts.get(self) if segment.slot.parts is not None else None
            if part is None or not (segment.slot.is_scaled or segment in batch.long):
                continue
            own = [out[segment.start : segment.end] for out in outs]
            part.rescale(own, biases)  # before anything is added to what is W x
            if segment in batch.long:
                part.add(own, x[segment.start : segment.end])
        parts = [adapter.get(self) for adapter in batch.adapters]
        if any(part is not None for part in parts):
            assert self.context.kernels is not None
            self.context.kernels.add_parts(outs, x, parts, batch.tiles)

    def _use_own_rows(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """The logits of tokens that an adapter has rows of; it has no factors for this layer then."""
        for segment in self.context.own_logits:
            if segment.slot.rows is not None and segment.slot.rows.outputs is not None:
                some = slice(segment.start, segment.end)
                logits, states = out.view(-1, out.shape[-1])[some], x.reshape(-1, x.shape[-1])[some]
                make_logits(logits, states, segment.slot.rows.outputs)

    def _rescale(self, outs: Sequence[torch.Tensor], scaled: ScaledTokens) -> None:
        """out += scale * W x in place, for the tokens of adapters with DoRA; the layer's bias is not W x."""
        for out, base, scales in zip(outs, self.bases, self.scales, strict=True):
            if scaled.rank in scales:
                products = out.index_select(0, scaled.tokens)
                if base.bias is not None:
                    products -= base.bias
                products *= scales[scaled.rank].index_select(0, scaled.places)
                out.index_add_(0, scaled.tokens, products)


class MultiLoraLinear(nn.Module):
    """A wrapped `Linear4bit` or `nn.Linear`; without an adapter in the batch it is that layer.

    The factors are buffers of its group, the engine's, and no part of the model's state.
    """

    def __init__(self, base: nn.Linear, group: LinearGroup, place: int) -> None:
        super().__init__()
        self.base = base
        self.group = group
        self.place = place

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = self.group
        return group.bases[self.place](x) if group.is_plain else group.output(self.place, x)

    # Not by way of nn.Module's, which looks for hooks at every call: with no adapter, this call is all there is to pay.
    __call__ = forward


def wrap_linears(
    model: Modules, context: LoraContext, shared: Sequence[Sequence[str]] = ()
) -> dict[str, MultiLoraLinear]:
    """Replace every linear layer of `model` in place; the wrapped layers by module name.

    `shared` names layers that are given the same input (`shared_inputs`) and are computed together.
    """
    logits_layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    together = {name for names in shared for name in names}
    wrapped = {}
    for names in (*shared, *([name] for name in linears if name not in together)):
        bases = [linears[name] for name in names]
        group = LinearGroup(bases, context, makes_logits=bases[0] is logits_layer)
        for place, name in enumerate(names):
            parent_name, _, child = name.rpartition(".")
            wrapped[name] = MultiLoraLinear(linears[name], group, place)
            setattr(model.get_submodule(parent_name), child, wrapped[name])
    return wrapped


def watch_embeddings(model: BaseModel, context: LoraContext) -> None:
    """Have `model` look up the tokens of adapters that have rows of the embeddings in these, in place."""

    def replace(_: nn.Module, given: tuple[torch.Tensor, ...], vectors: torch.Tensor) -> None:
        for segment in context.own_tokens:
            if segment.slot.rows is not None and segment.slot.rows.inputs is not None:
                some = slice(segment.start, segment.end)
                look_up(vectors.view(-1, vectors.shape[-1])[some], given[0].view(-1)[some], segment.slot.rows.inputs)

    model.get_input_embeddings().register_forward_hook(replace)


def unwrap_linears(model: Modules, wrapped: dict[str, MultiLoraLinear]) -> None:
    """Put the base's own layers back."""
    for name, layer in wrapped.items():
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, layer.base)


@torch.inference_mode()
def shared_inputs(model: BaseModel) -> list[list[str]]:
    """Names of linear layers of one parent that get the very same tensor, as seen in a forward pass of the model."""
    calls: list[tuple[str, torch.Tensor]] = []  # holds the tensors, so that no two are at one address

    def note(name: str) -> Callable[..., None]:
        return lambda _, args: calls.append((name, args[0]))

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(note(name)) for name, module in linears]
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device))
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in calls]
    # which experts two tokens are routed to is chance, and the input of an expert's gate and up is one in any case
    pairs = shared_inputs_of_experts(model)
    known = {name for pair in pairs for name in pair}
    calls = [(name, x) for name, x in calls if name not in known]
    groups: dict[tuple[str, int], list[str]] = {}
    for name, x in calls:
        if names.count(name) == 1:  # a layer that is used twice has no one input
            groups.setdefault((name.rpartition(".")[0], id(x)), []).append(name)
    return [*(group for group in groups.values() if len(group) > 1), *pairs]
