"""Record: all that is known of one adapter's content, by its digest; and the table of these."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they load torch, which a gateway does without
    from serve.lora.product import Factors, Slot

MAX_REMEMBERED = 10_000  # adapters that are not here any more, but were used


class State(Enum):
    """Where an adapter is: not in memory, being read, in memory, or waiting for its last requests to end."""

    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, order=True)
class Label:
    """How an adapter is shown, and the names that stand in it, which a key must be for: several in a mix."""

    text: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterStatus:
    """What one record says at one moment, for those who run the server."""

    digest: str
    label: Label  # of what was asked for first, or of who holds it
    state: State
    in_slot: bool
    is_held: bool
    is_pinned: bool
    num_bytes: int  # in host memory
    num_running: int  # requests that have not ended
    num_requests: int  # since the start
    last_used: str | None  # UTC


@dataclass(eq=False)
class Record:
    """One adapter, or mix, by content.

    Its fields are written under the table's lock, but for two of its slot, which need none (see `Slots`): `filling` is
    the loader's, `slot_step` is the step's.
    """

    digest: str
    label: Label = Label()  # of the version that was asked for first
    factors: Factors | None = None  # in host memory
    num_bytes: int = 0
    users: int = 0  # how often it is held there
    holders: dict[str, bool] = field(default_factory=dict)  # names that hold it by hand -> whether in a slot, too
    num_loading: int = 0  # threads that have it read, or wait for that
    num_draining: int = 0  # unloadings that wait for its last requests
    num_requests: int = 0
    last_used: float = 0.0  # seconds since the epoch
    leased: float | None = None  # when its files were last wanted, on the monotonic clock; None: no lease on them
    slot: Slot | None = None
    slot_step: int = 0  # the latest step that used the slot
    filling: Future[None] | None = None  # of the slot
    reading: threading.Lock = field(default_factory=threading.Lock)

    @property
    def state(self) -> State:
        if self.num_draining:
            return State.DRAINING
        if self.factors is not None:
            return State.READY
        return State.LOADING if self.num_loading else State.ABSENT

    @property
    def is_pinned(self) -> bool:
        return any(self.holders.values())

    @property
    def is_gone(self) -> bool:
        """Whether nothing of it is here and nobody waits for it: only what it was used for is still known."""
        has_part = self.factors is not None or self.slot is not None or self.filling is not None
        return not (has_part or self.users or self.num_loading or self.num_draining)

    def status(self, num_running: int = 0) -> AdapterStatus:
        """What is to be shown of it."""
        last = datetime.fromtimestamp(self.last_used, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        holder = next(iter(self.holders), None)
        label = self.label if self.num_requests or holder is None else Label(holder, self.label.names)
        return AdapterStatus(
            digest=self.digest,
            label=label,
            state=self.state,
            in_slot=self.slot is not None,
            is_held=bool(self.holders),
            is_pinned=self.is_pinned,
            num_bytes=self.num_bytes,
            num_running=num_running,
            num_requests=self.num_requests,
            last_used=last if self.last_used else None,
        )


class Records:
    """The records by digest, the least recently used first. `lock` is for whoever writes to them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._records: OrderedDict[str, Record] = OrderedDict()

    def get(self, digest: str) -> Record | None:
        return self._records.get(digest)

    def __getitem__(self, digest: str) -> Record:
        return self._records[digest]

    def all(self) -> list[Record]:
        """Every record, the least recently used first."""
        return list(self._records.values())

    def make(self, digest: str, label: Label = Label()) -> Record:
        """The record of this content, a new one if need be, under the lock."""
        record = self._records.get(digest)
        if record is None:
            record = self._records[digest] = Record(digest)
        if not record.label.text:
            record.label = label
        return record

    def touch(self, record: Record) -> None:
        """Note that a record is used now, under the lock."""
        self._records.move_to_end(record.digest)

    def forget(self, record: Record) -> None:
        """Drop a record that says nothing: nothing of it is here, and it was never used. Under the lock."""
        if record.is_gone and not record.num_requests and record.leased is None:
            self._records.pop(record.digest, None)

    def trim(self) -> None:
        """Drop what is gone, the longest unused first, until no more than MAX_REMEMBERED are left, under the lock."""
        excess = len(self._records) - MAX_REMEMBERED
        for record in self.all() if excess > 0 else ():
            if record.is_gone:
                del self._records[record.digest]
                excess -= 1
                if excess <= 0:
                    return
