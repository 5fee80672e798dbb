"""PagePool: which pages of the KV cache are whose, and which are kept for requests that begin with the same tokens.

A page is known by the base, the adapter's digest, the request's salt and all tokens up to its end: what one adapter
computed can never be found by a request for another, nor for a changed one, nor by one with another salt. Known pages
are shared by reference and never written to again. No torch.
"""

import hashlib
import heapq
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence

from serve.engine.request import Request

PAGE = 16  # tokens


def pages_for(num_tokens: int) -> int:
    """How many pages hold that many tokens."""
    return -(-num_tokens // PAGE)


class PagePool:
    """Pages 1 to `num_pages`; page 0 belongs to nobody and fills up tables.

    A page is free, or used by one or more running requests, or idle: known, used by none. Idle pages are at most
    `max_idle` (0: nothing is known), and make room when pages are needed, the least recently used first and the
    ends of sequences before their beginnings.
    """

    def __init__(self, num_pages: int, base: str = "", max_idle: int = 0) -> None:
        self.num_pages = num_pages
        self.base = base  # fingerprint
        self.max_idle = max_idle
        self._free = list(range(1, num_pages + 1))  # a heap: low numbers first keeps what is used together
        self._users: Counter[int] = Counter()  # page -> requests that use it
        self._known: dict[bytes, int] = {}  # key -> page
        self._keys: dict[int, bytes] = {}  # the other way round
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._in_flight: set[bytes] = set()  # keys of pages that running requests are about to compute
        self._dirty: list[int] = []

    @property
    def num_used(self) -> int:
        return len(self._users)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._idle)

    def allocate(self, request: Request, spare: int) -> bool:
        """Allocate pages for all of the request's tokens, known ones where there are some; whether there was room.

        At least the last token is left to compute: its logits are needed. `spare` pages must be left over.
        """
        found = self._find(request)
        num_new = pages_for(request.num_tokens) - len(found)
        if num_new + spare > self.num_available - sum(page in self._idle for page in found):
            return False
        for page in found:
            self._users[page] += 1
            self._idle.pop(page, None)
        request.pages = found + [self._take() for _ in range(num_new)]
        request.num_computed = len(found) * PAGE
        if self.max_idle:
            keys = self._keys_of(request, request.num_tokens // PAGE)[len(found) :]
            request.in_flight = tuple(key for key in keys if key not in self._known)
            self._in_flight.update(request.in_flight)
        return True

    def extend(self, request: Request, num_ahead: int = 0, spare: int = 0) -> bool:
        """Have pages for the next token of a request whose others are computed, and `num_ahead` more.

        Whether there are so many; `spare` pages must be left over.
        """
        num_new = pages_for(request.num_tokens + num_ahead) - len(request.pages)
        if num_new > 0 and num_new + spare > self.num_available:
            return False
        request.pages += [self._take() for _ in range(num_new)]
        return True

    def free(self, request: Request, *, is_clean: bool) -> None:
        """Free the request's pages. Unless `is_clean` there may be NaN in those that are not known."""
        self._clear_in_flight(request)
        for page in reversed(request.pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            del self._users[page]
            if page in self._keys:
                self._idle[page] = None
            else:
                heapq.heappush(self._free, page)
                if not is_clean:
                    self._dirty.append(page)
        request.pages = []
        self.trim()

    def insert(self, request: Request) -> None:
        """Insert the whole pages of what the request has computed, now that its logits were found to be finite."""
        self._clear_in_flight(request)
        if not self.max_idle:
            return
        count = request.num_computed // PAGE
        for key, page in zip(self._keys_of(request, count), request.pages, strict=False):
            if key not in self._known and page not in self._keys:
                self._known[key] = page
                self._keys[page] = key

    def is_in_flight(self, request: Request) -> bool:
        """Whether a running request is about to compute the first page that this one would have to compute."""
        keys = self._findable(request) if self._in_flight else ()
        return next((key in self._in_flight for key in keys if key not in self._known), False)

    def trim(self) -> None:
        """Free what is idle beyond `max_idle`."""
        while len(self._idle) > self.max_idle:
            heapq.heappush(self._free, self._evict())

    def take_dirty(self) -> list[int]:
        """Pages that must be zeroed before they are used again; they are not named twice."""
        dirty, self._dirty = self._dirty, []
        return dirty

    def _find(self, request: Request) -> list[int]:
        pages: list[int] = []
        for key in self._findable(request) if self._known else ():
            if key not in self._known:
                break
            pages.append(self._known[key])
        return pages

    def _findable(self, request: Request) -> Sequence[bytes]:
        """Keys of the pages that need not be computed, were they known: logits of the rest are needed."""
        count = request.num_scored if request.num_unscored else request.num_tokens - 1
        return self._keys_of(request, count // PAGE) if self.max_idle else ()

    def _keys_of(self, request: Request, count: int) -> list[bytes]:
        """The keys of the request's first `count` pages, each computed once."""
        keys = request.page_keys
        while len(keys) < count:
            before = keys[-1] if keys else root_key(self.base, request.adapter, request.salt)
            keys.append(page_key(before, request.tokens(len(keys) * PAGE, PAGE)))
        return keys[:count]

    def _take(self) -> int:
        page = heapq.heappop(self._free) if self._free else self._evict()
        self._users[page] = 1
        return page

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._known[self._keys.pop(page)]
        return page

    def _clear_in_flight(self, request: Request) -> None:
        self._in_flight.difference_update(request.in_flight)
        request.in_flight = ()


def root_key(base: str, adapter: str | None, salt: str = "") -> bytes:
    """What stands before the first page of every sequence under this adapter's digest, or none, and this salt."""
    kind = "base" if adapter is None else "adapter"
    return hashlib.sha256(f"{base}\0{kind}\0{adapter or ''}\0{salt}".encode()).digest()


def page_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a page, made of its tokens and all that comes before it."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()
