"""Attention over a packed batch: one row [1, tokens] that holds the tokens of many requests.

Registered with transformers under NAME; a model set to it hands every layer's query, key and value to
`packed_attention`, together with the `PackedBatch` that was given to its forward as `packed`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from adapterhub_local.errors import Incompatible
from serve.engine.cache import KVCache

NAME = "qhub"
# What models pass along that has no bearing on packed causal attention.
_HARMLESS = frozenset(
    ("is_causal", "position_ids", "cache_position", "output_attentions", "output_hidden_states", "use_cache")
)


@dataclass(frozen=True)
class Prompt:
    """Tokens [start, end) of the batch: positions `first`, `first` + 1, ... of row `row`."""

    start: int
    end: int
    row: int
    first: int


@dataclass
class PackedBatch:
    """Where each token of the batch belongs. All tensors are int64 on the model's device.

    `rows`, `positions`: (tokens,). `single`: (n,) indices of the tokens that are alone in their row, the
    answering requests; their rows and positions as plain integers, too. `prompts`: the others.
    """

    cache: KVCache
    rows: torch.Tensor
    positions: torch.Tensor
    single: torch.Tensor
    single_rows: list[int]
    single_positions: list[int]
    prompts: list[Prompt]
    windows: dict[int, int | None] = field(default_factory=dict)  # what each layer asked for, for the check at load
    _masks: dict = field(default_factory=dict)

    @property
    def span(self) -> int:
        """Rows [0, span) hold all single tokens; worth computing as a whole if most of them are used."""
        return max(self.single_rows) + 1

    @property
    def num_places(self) -> int:
        """The length of the longest row."""
        prompts = (prompt.first + prompt.end - prompt.start for prompt in self.prompts)
        return max([position + 1 for position in self.single_positions] + list(prompts))

    @property
    def is_dense(self) -> bool:
        return self.span <= 2 * len(self.single_rows)

    def single_mask(self, dtype: torch.dtype, window: int | None) -> torch.Tensor:
        """Additive mask (rows, 1, 1, longest row). Rows of the span without a token see their first place only."""
        key = ("single", dtype, window)
        if key not in self._masks:
            device = self.rows.device
            if self.is_dense:
                last = torch.zeros(self.span, dtype=torch.int64, device=device)
                last[self.rows[self.single]] = self.positions[self.single]
            else:
                last = self.positions[self.single]
            places = torch.arange(max(self.single_positions) + 1, device=device)
            self._masks[key] = _additive(_visible(last[:, None], places, window), dtype)[:, None, None]
        return self._masks[key]

    def prompt_mask(self, prompt: Prompt, dtype: torch.dtype, window: int | None, repeats: int) -> torch.Tensor:
        """Additive mask (repeats * tokens, places) of one prompt's chunk."""
        key = (prompt, dtype, window, repeats)
        if key not in self._masks:
            places = torch.arange(prompt.first + prompt.end - prompt.start, device=self.rows.device)
            visible = _visible(places[prompt.first :, None], places, window)
            self._masks[key] = _additive(visible, dtype).repeat(repeats, 1)
        return self._masks[key]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    bias: Callable[[int, int, torch.Tensor], torch.Tensor] | None = None,
    dropout: float = 0.0,
    **extra: object,
) -> tuple[torch.Tensor, None]:
    """Write keys and values into their rows, then attend to them.

    `bias(heads, places, query)` (heads, places), if given, is added to the scores of every token.
    query (1, heads, tokens, head_dim), key and value (1, kv_heads, tokens, head_dim); the result is
    (1, tokens, heads, head_dim). Raises Incompatible for a kind of attention that is not computed here.
    """
    unknown = [name for name, given in extra.items() if given is not None and name not in _HARMLESS]
    if unknown or attention_mask is not None or dropout:
        raise Incompatible(f"this model's attention needs {', '.join(unknown) or 'a mask of its own'}, not supported")
    index = module.layer_idx
    assert isinstance(index, int)
    packed.windows[index] = sliding_window
    keys, values = packed.cache.write(index, packed.rows, packed.positions, key[0], value[0])
    _, heads, num_tokens, head_dim = query.shape
    kv_heads = keys.shape[1]
    repeats = heads // kv_heads
    scale = head_dim**-0.5 if scaling is None else scaling
    # query heads that share a key head become one head with more queries: nothing is repeated in memory
    grouped = query[0].view(kv_heads, repeats, num_tokens, head_dim)
    out = query.new_empty(num_tokens, kv_heads, repeats, values.shape[-1])
    added = None
    if bias is not None:  # (kv_heads, repeats, places) up to the longest row
        added = bias(heads, packed.num_places, query).view(kv_heads, repeats, -1)
    if packed.single_rows:
        out[packed.single] = _attend_single(packed, grouped, keys, values, scale, sliding_window, softcap, added)
    for prompt in packed.prompts:
        count = prompt.end - prompt.start
        queries = grouped[:, :, prompt.start : prompt.end].reshape(1, kv_heads, repeats * count, head_dim)
        places = slice(0, prompt.first + count)
        mask = packed.prompt_mask(prompt, query.dtype, sliding_window, repeats)
        if added is not None:
            mask = mask + added[:, :, None, places].expand(-1, -1, count, -1).flatten(1, 2)
        rows = slice(prompt.row, prompt.row + 1)
        result = _attend(queries, keys[rows, :, places], values[rows, :, places], mask, scale, softcap)
        out[prompt.start : prompt.end] = result[0].view(kv_heads, repeats, count, -1).permute(2, 0, 1, 3)
    return out.view(1, num_tokens, heads, -1), None


def _attend_single(
    packed: PackedBatch,
    grouped: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    added: torch.Tensor | None,
) -> torch.Tensor:
    """All rows with one token at once: (single tokens, kv_heads, repeats, head_dim)."""
    queries = grouped[:, :, packed.single].permute(2, 0, 1, 3)
    mask = packed.single_mask(queries.dtype, window)
    if added is not None:
        mask = mask + added[:, :, : mask.shape[-1]]
    rows = packed.rows[packed.single]
    places = slice(0, mask.shape[-1])
    if not packed.is_dense:
        return _attend(queries, keys[rows, :, places], values[rows, :, places], mask, scale, softcap)
    # a view of the cache instead of a copy of its rows
    spread = queries.new_zeros(packed.span, *queries.shape[1:])
    spread[rows] = queries
    used = slice(0, packed.span)
    return _attend(spread, keys[used, :, places], values[used, :, places], mask, scale, softcap)[rows]


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(cap(scale * query @ keys^T) + mask) @ values; tensors (rows, kv_heads, queries or places, head_dim)."""
    if softcap is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = softcap * torch.tanh(scale * (query @ keys.transpose(-1, -2)) / softcap) + mask
    return torch.softmax(scores.float(), dim=-1).to(values.dtype) @ values


def _visible(last: torch.Tensor, places: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which places a token at position `last` attends to: itself and before, at most `window` of them."""
    visible = places <= last
    return visible if window is None else visible & (places > last - window)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def register() -> None:
    """Make NAME known to transformers. Its masks are left out: positions in the batch say all."""
    AttentionInterface.register(NAME, packed_attention)
