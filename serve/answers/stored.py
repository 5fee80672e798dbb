"""Stored: answers of /v1/responses are kept in memory for a while, for requests that speak of them by their ids.

Each is its key's alone. When there are too many, the oldest of the key that has most go first. They are kept as JSON,
which takes the room that it seems to take.
"""

import threading
import time
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import from_json, to_json

from adapterhub_local.errors import NotFound
from serve.errors import BadParameter
from serve.requests.responses import Item, ResponsesRequest

SECONDS = 3600.0  # for which an answer is kept
MAX_BYTES = 64 << 20  # of all answers
BYTES_AN_ITEM = 500  # what finding it by its id takes
PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
STORES_NOTHING = (
    "this server stores no answers (`qhub serve --stored-responses`): send the whole conversation as input; in the "
    "Vercel AI SDK set providerOptions.openai.store = false"
)
_ITEM: TypeAdapter[Item] = TypeAdapter(Item)
Owner = str | None  # the id of the key that asked


@dataclass(frozen=True)
class Stored:
    """An answer, and the conversation up to its end: what it answered, then its own items."""

    body: bytes
    conversation: bytes
    ids: Sequence[str]  # of the items of the conversation
    num_output: int
    until: float  # on the clock of its store

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.body) + len(self.conversation) + BYTES_AN_ITEM * (len(self.ids) + 1)

    @property
    def response(self) -> dict[str, Any]:
        """The answer as its client got it."""
        found: dict[str, Any] = from_json(self.body)
        return found

    @property
    def items(self) -> list[dict[str, Any]]:
        """The whole conversation."""
        found: list[dict[str, Any]] = from_json(self.conversation)
        return found

    @property
    def answered(self) -> list[dict[str, Any]]:
        """The items that it answered."""
        return self.items[: len(self.ids) - self.num_output]


class StoredResponses:
    """The answers that a server keeps, `most` of them. Safe to use from several threads."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._clock = clock
        self._stored: defaultdict[Owner, OrderedDict[str, Stored]] = defaultdict(OrderedDict)
        # id of an item -> the answers that have it, which all have the same: a server's ids are given once
        self._holders: dict[tuple[Owner, str], dict[str, None]] = {}
        self._sizes: defaultdict[Owner, int] = defaultdict(int)
        self._lock = threading.Lock()

    def resize(self, most: int) -> None:
        """Keep at most so many from now on."""
        with self._lock:
            self.most = most
            self._drop_old()

    def keep(self, owner: Owner, conversation: Sequence[Item], response: dict[str, Any]) -> None:
        """Store an answer to a conversation."""
        items = [_shown(item) for item in conversation] + response["output"]
        ids = [item["id"] for item in items]
        found = Stored(to_json(response), to_json(items), ids, len(response["output"]), self._clock() + SECONDS)
        with self._lock:
            self._stored[owner][response["id"]] = found
            self._sizes[owner] += found.size
            for item_id in ids:
                self._holders.setdefault((owner, item_id), {})[response["id"]] = None
            self._drop_old()

    def find(self, owner: Owner, response_id: str) -> Stored:
        """A stored answer. Raises NotFound."""
        with self._lock:
            self._drop_old()
            if (found := self._stored[owner].get(response_id)) is None:
                raise NotFound(f"no answer '{response_id[:80]}' is stored{self._why()}")
            return found

    def forget(self, owner: Owner, response_id: str) -> None:
        """Drop an answer. Raises NotFound."""
        self.find(owner, response_id)
        with self._lock:
            if response_id in self._stored[owner]:
                self._drop(owner, response_id)

    def shelf(self, owner: Owner) -> "Shelf":
        """What is stored for a key, as requests speak of it."""
        return Shelf(self, owner)

    def item(self, owner: Owner, item_id: str) -> dict[str, Any]:
        """One item. Raises NotFound."""
        with self._lock:
            self._drop_old()
            if not (holders := self._holders.get((owner, item_id))):
                raise NotFound(f"no item '{item_id[:80]}' is stored{self._why()}")
            found = self._stored[owner][next(reversed(holders))]
        return found.items[found.ids.index(item_id)]

    def _why(self) -> str:
        return f": answers are kept for {SECONDS / 60:g} minutes, the newest {self.most:,} of them"

    def _drop_old(self) -> None:
        now = self._clock()
        for owner, kept in list(self._stored.items()):
            while kept and next(iter(kept.values())).until <= now:
                self._drop(owner, next(iter(kept)))
            if not kept:
                del self._stored[owner]
                self._sizes.pop(owner, None)
        while sum(map(len, self._stored.values())) > self.most:
            self._drop_of(max(self._stored, key=lambda owner: len(self._stored[owner])))
        while sum(self._sizes.values()) > MAX_BYTES:
            self._drop_of(max(self._sizes, key=lambda owner: self._sizes[owner]))

    def _drop_of(self, owner: Owner) -> None:
        """Drop the oldest answer of a key."""
        self._drop(owner, next(iter(self._stored[owner])))

    def _drop(self, owner: Owner, response_id: str) -> None:
        gone = self._stored[owner].pop(response_id)
        self._sizes[owner] -= gone.size
        for item_id in gone.ids:
            holders = self._holders.get((owner, item_id), {})
            holders.pop(response_id, None)
            if not holders:
                self._holders.pop((owner, item_id), None)


@dataclass(frozen=True)
class Shelf:
    """The stored answers of one key: a `requests.responses.Memory`."""

    store: StoredResponses
    owner: Owner

    def conversation(self, response_id: str) -> list[Item]:
        """Everything up to the end of an answer. Raises BadParameter."""
        try:
            return [_ITEM.validate_python(item) for item in self.find(response_id).items]
        except NotFound as error:
            raise BadParameter(str(error), "previous_response_id", "previous_response_not_found") from None

    def item(self, item_id: str) -> Item:
        """One item. Raises BadParameter."""
        try:
            self._check()
            return _ITEM.validate_python(self.store.item(self.owner, item_id))
        except NotFound as error:
            raise BadParameter(str(error), "input", "item_not_found") from None

    def find(self, response_id: str) -> Stored:
        """A stored answer. Raises NotFound."""
        self._check()
        return self.store.find(self.owner, response_id)

    def forget(self, response_id: str) -> None:
        """Drop an answer. Raises NotFound."""
        self._check()
        self.store.forget(self.owner, response_id)

    def keeper(self, asked: ResponsesRequest, conversation: Sequence[Item]) -> Callable[[dict[str, Any]], None] | None:
        """What stores the answer to a request; None if it is not to be."""
        if not self.store.most or asked.store is False:
            return None
        return lambda response: self.store.keep(self.owner, conversation, response)

    def _check(self) -> None:
        if not self.store.most:
            raise NotFound(STORES_NOTHING)


def _shown(item: Item) -> dict[str, Any]:
    """An item of a conversation as OpenAI shows it: texts in parts, and an id; what has none gets one."""
    shown = item.model_dump(exclude_none=True)
    shown.setdefault("id", f"{PREFIXES[item.type]}_{uuid.uuid4().hex}")
    if isinstance(shown.get("content"), str):
        kind = "output_text" if shown["role"] == "assistant" else "input_text"
        shown["content"] = [{"type": kind, "text": shown["content"]}]
    if item.type == "reasoning":
        shown.setdefault("summary", [])
    return shown
