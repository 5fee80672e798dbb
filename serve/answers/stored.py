"""Stored: answers of /v1/responses are kept in memory for a while, for requests that speak of them by their ids.

Each is its key's alone, and the oldest go first when there are too many.
"""

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import to_json

from adapterhub_local.errors import NotFound
from serve.errors import BadParameter
from serve.requests.responses import Item, ResponsesRequest

SECONDS = 3600.0  # for which an answer is kept
MAX_BYTES = 64 << 20  # of all answers, as JSON
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

    response: dict[str, Any]
    items: Sequence[dict[str, Any]]
    until: float  # on the clock of its store
    size: int

    @property
    def answered(self) -> Sequence[dict[str, Any]]:
        """The items that it answered."""
        return self.items[: len(self.items) - len(self.response["output"])]


class StoredResponses:
    """The answers that a server keeps, `most` of them. Safe to use from several threads."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._clock = clock
        self._stored: OrderedDict[tuple[Owner, str], Stored] = OrderedDict()
        self._items: dict[tuple[Owner, str], tuple[str, int]] = {}  # id of an item -> the newest answer that has it
        self._size = 0
        self._lock = threading.Lock()

    def keep(self, owner: Owner, conversation: Sequence[Item], response: dict[str, Any]) -> None:
        """Store an answer to a conversation."""
        items = [_shown(item) for item in conversation] + response["output"]
        size = len(to_json([response, items]))
        with self._lock:
            self._stored[owner, response["id"]] = Stored(response, items, self._clock() + SECONDS, size)
            self._size += size
            self._items |= {(owner, item["id"]): (response["id"], at) for at, item in enumerate(items)}
            self._drop_old()

    def find(self, owner: Owner, response_id: str) -> Stored:
        """A stored answer. Raises NotFound."""
        with self._lock:
            self._drop_old()
            if (found := self._stored.get((owner, response_id))) is None:
                raise NotFound(f"no answer '{response_id[:80]}' is stored{self._why()}")
            return found

    def forget(self, owner: Owner, response_id: str) -> None:
        """Drop an answer. Raises NotFound."""
        self.find(owner, response_id)
        with self._lock:
            if (owner, response_id) in self._stored:
                self._drop(owner, response_id)

    def shelf(self, owner: Owner) -> "Shelf":
        """What is stored for a key, as requests speak of it."""
        return Shelf(self, owner)

    def item(self, owner: Owner, item_id: str) -> dict[str, Any]:
        """One item. Raises NotFound."""
        with self._lock:
            self._drop_old()
            if (place := self._items.get((owner, item_id))) is None:
                raise NotFound(f"no item '{item_id[:80]}' is stored{self._why()}")
            return self._stored[owner, place[0]].items[place[1]]

    def _why(self) -> str:
        return f": answers are kept for {SECONDS / 60:g} minutes, the newest {self.most:,} of them"

    def _drop_old(self) -> None:
        now = self._clock()
        while self._stored:
            (owner, response_id), oldest = next(iter(self._stored.items()))
            if oldest.until > now and len(self._stored) <= self.most and self._size <= MAX_BYTES:
                return
            self._drop(owner, response_id)

    def _drop(self, owner: Owner, response_id: str) -> None:
        gone = self._stored.pop((owner, response_id))
        self._size -= gone.size
        for item in gone.items:
            if self._items.get((owner, item["id"]), ("", 0))[0] == response_id:
                del self._items[owner, item["id"]]


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
    """An item of a conversation as OpenAI shows it: texts in parts, and an id."""
    shown = item.model_dump(exclude_none=True)
    if not isinstance(shown.get("id"), str):
        shown["id"] = f"{PREFIXES[item.type]}_{uuid.uuid4().hex}"
    if isinstance(shown.get("content"), str):
        kind = "output_text" if shown["role"] == "assistant" else "input_text"
        shown["content"] = [{"type": kind, "text": shown["content"]}]
    if item.type == "reasoning":
        shown.setdefault("summary", [])
    return shown
