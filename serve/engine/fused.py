"""Steps of few tokens as one call of C: what CUDA graphs are on a GPU, for models of Llama's kind on a CPU.

Between small products, Python and torch take as long as the products. A step is used only after it gave what the model
itself gives; where it does not fit (many tokens, or a good many with long contexts, an adapted head, rows of
embeddings) the model computes as ever.
"""

import ctypes
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from adapterhub_local.base.attention import AttentionKind
from adapterhub_local.base.model import BaseModel
from adapterhub_local.cores import Cores, most_threads
from adapterhub_local.errors import Incompatible
from serve.engine.cache import KVCache
from serve.engine.decoder import read_decoder
from serve.engine.llama import llama
from serve.engine.pages import PAGE, pages_for
from serve.engine.request import Scheduled
from serve.kernels.compiled import CannotCompile
from serve.kernels.cpu import SPAN, PartInC, part_in_c
from serve.kernels.part import Parts
from serve.kernels.step import Pointer, Step, load_step, room_for
from serve.lora.product import Segment, tiles_in_place

MAX_TOKENS = 512  # of a step; beyond, its room would grow for nothing
FEW_TOKENS = 64  # more of them share their keys and values in torch's attention, not in the step's
MAX_PLACES = 512  # that each of more tokens attends to, in the mean: the step is the faster way up to about 540


class FusedStep:
    """Steps of one model over its cache, with adapters in place, by as many threads as `cores` gives.

    Raises Incompatible where C cannot compute them.
    """

    def __init__(
        self, model: BaseModel, cache: KVCache, kinds: Sequence[AttentionKind], cores: Cores | None = None
    ) -> None:
        try:
            self._call = load_step()
        except CannotCompile as error:
            raise Incompatible(str(error)) from None
        self.model = llama(model)
        self.cache = cache
        self.decoder = read_decoder(model, kinds)
        self._parts: WeakKeyDictionary[Parts, Any] = WeakKeyDictionary()
        self._room = self._cos = self._sin = torch.empty(0)
        self._like = torch.empty(0, dtype=model.dtype)
        self._first: torch.Tensor | None = None  # the first layer's keys when `_held` was made
        self._held: tuple[Any, Any, tuple[int, int, int]] | None = None
        self.cores = cores or Cores(most_threads(torch.get_num_threads()))

    def forward(
        self, batch: Sequence[Scheduled], segments: Sequence[Segment], wanted: Sequence[int]
    ) -> torch.Tensor | None:
        """Logits (n, vocabulary), float32, of the tokens at the `wanted` places; None if the batch does not fit."""
        count = sum(item.num_tokens for item in batch)
        places = sum(item.num_tokens * (item.start + item.end + 1) // 2 for item in batch)
        head = self.model.get_output_embeddings()
        slots = [each.slot for each in segments]
        if count > MAX_TOKENS or (count > FEW_TOKENS and places > MAX_PLACES * count):
            return None
        if any(each.rows or each.parts is None or each.parts.get(head.group) is not None for each in slots):
            return None
        structure, decoder = self.decoder.structure, self.model.model
        tokens = [token for item in batch for token in item.tokens]
        positions = [place for item in batch for place in range(item.start, item.end)]
        x = decoder.embed_tokens(torch.tensor(tokens)).float()
        cos, sin = self._angles(positions)
        tables, written, lengths = _where(batch)
        owns, rows = tiles_in_place(segments)
        in_c = [self._in_c(own) for own in owns]  # kept until the step is done
        tiles = torch.tensor(rows, dtype=torch.int32)
        spans = -(-tables.shape[1] * PAGE // SPAN)
        width = max((own.widest for own in owns), default=0)
        size = room_for(structure, count, spans, self.decoder.widest, width)
        if self._room.numel() < size:
            self._room = torch.empty(size)
        keys, values, strides = self._cache()
        asked = torch.tensor(wanted, dtype=torch.int64)
        logits = torch.empty(len(wanted), structure.head.outputs)
        step = Step(
            x=x.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(), places=written.data_ptr(),
            wanted=asked.data_ptr(), keys=keys, values=values, tables=tables.data_ptr(),
            lengths=lengths.data_ptr(), tiles=tiles.data_ptr(),
            owns=(Pointer * len(rows))(*map(ctypes.addressof, in_c)),
            logits=logits.data_ptr(), room=self._room.data_ptr(), tokens=count, num_wanted=len(wanted),
            num_tiles=len(rows), table_row=tables.stride(0), spans=spans, page_step=strides[0],
            head_step=strides[1], place_step=strides[2], widest=self.decoder.widest,
        )  # fmt: skip
        self._call(ctypes.byref(structure), ctypes.byref(step), self.cores.threads())
        return logits

    def _angles(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (tokens, head_dim) of the rotary embedding."""
        rotary = self.model.model.rotary_emb
        if rotary.rope_type == "dynamic":  # which depends on the longest position asked for
            cos, sin = rotary(self._room, torch.tensor([positions]))
            return cos[0].contiguous(), sin[0].contiguous()
        last = max(positions)
        if last >= len(self._cos):  # in whole vectors: torch rounds the rest of a tensor in another way
            angles = rotary(self._room, torch.arange((last // 512 + 1) * 512)[None])
            self._cos, self._sin = (each[0].contiguous() for each in angles)
        at = torch.tensor(positions)
        return self._cos[at], self._sin[at]

    def _in_c(self, own: Parts) -> Any:
        """An adapter's parts for C, four a layer; they point into its memory, and go with it."""
        if own not in self._parts:
            groups = self.decoder.groups
            self._parts[own] = (PartInC * len(groups))(*(part_in_c(own.get(group)) for group in groups))
        return self._parts[own]

    def _cache(self) -> tuple[Any, Any, tuple[int, int, int]]:
        """Addresses of each layer's keys and of its values, and the steps between pages, heads and places."""
        structure = self.decoder.structure
        shape = structure.kv_heads, structure.dim
        first = self.cache.pair(0, *shape, self._like)[0]
        if self._held is None or first is not self._first:  # the cache has grown, or is another
            pairs = [self.cache.pair(layer, *shape, self._like) for layer in range(structure.num_layers)]
            keys, values = (
                (Pointer * len(pairs))(*(each.data_ptr() for each in side)) for side in zip(*pairs, strict=True)
            )
            page, head, place, _ = first.stride()
            self._first, self._held = first, (keys, values, (page, head, place))
        return self._held


def _where(batch: Sequence[Scheduled]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token: the pages of its sequence (tokens, pages) int32; the page and the place in it that it is written
    to (tokens, 2) int64; how many places it attends to (tokens,) int32."""
    width = max(pages_for(item.end) for item in batch)
    tables, places, lengths = [], [], []
    for item in batch:
        pages = item.request.pages[: pages_for(item.end)]
        table = [*pages, *[0] * (width - len(pages))]
        for position in range(item.start, item.end):
            tables.append(table)
            places.append((pages[position // PAGE], position % PAGE))
            lengths.append(position + 1)
    return torch.tensor(tables, dtype=torch.int32), torch.tensor(places), torch.tensor(lengths, dtype=torch.int32)
