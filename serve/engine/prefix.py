"""PrefixCache: keys and values of token sequences seen before, in pages, so that a prompt's beginning is computed once.

A page is known by the base, the adapter's digest and all tokens up to its end: what one adapter computed can never be
found by a request for another, nor for a changed one. Rows get copies; a page is never written to.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch

from serve.engine.cache import KVCache
from serve.engine.request import Request

PAGE = 16  # tokens


class PrefixCache:
    """Pages within a budget of bytes, the least recently used leaving first and ends of sequences before beginnings."""

    def __init__(self, cache: KVCache, base: str, max_bytes: int) -> None:
        self.cache = cache
        self.base = base  # fingerprint
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._pages: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def restore(self, request: Request) -> int:
        """Copy what is known of the beginning of the request's tokens into its row; how many tokens that are.

        At least the last token is left to compute: its logits are needed.
        """
        found = []
        for key in page_keys(self.base, request.adapter, request.tokens(0, request.num_tokens - 1)):
            if key not in self._pages:
                break
            found.append(key)
        if found:
            assert request.row is not None
            self.cache.fill(request.row, torch.cat([self._pages[key] for key in found], dim=2))
            self._touch(found)
        return len(found) * PAGE

    def keep(self, request: Request) -> None:
        """Remember the whole pages of what is computed in the request's row."""
        if not self.max_bytes or not self.cache.is_uniform:
            return
        assert request.row is not None
        keys = list(page_keys(self.base, request.adapter, request.tokens(0, request.num_computed)))
        for number, key in enumerate(keys):
            if key not in self._pages:
                page = self.cache.read(request.row, number * PAGE, (number + 1) * PAGE)
                self._pages[key] = page
                self.num_bytes += page.nbytes
        self._touch(keys)
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._pages.popitem(last=False)[1].nbytes

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Note a use, of the beginning last: a page without those before it is of no use."""
        for key in reversed(keys):
            self._pages.move_to_end(key)


def page_keys(base: str, adapter: str | None, tokens: Sequence[int]) -> Iterator[bytes]:
    """The names of the whole pages of `tokens`, each made of all that comes before it."""
    kind = "base" if adapter is None else "adapter"
    key = hashlib.sha256(f"{base}\0{kind}\0{adapter or ''}".encode()).digest()
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        key = hashlib.sha256(key + array("q", tokens[start : start + PAGE]).tobytes()).digest()
        yield key
