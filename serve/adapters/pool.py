"""AdapterPool: who holds which adapter in host memory, by content digest, within a budget of bytes.

Its records are all that the server knows of an adapter; slots fill in theirs. Names are only shown, never looked up.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from adapterhub_local.errors import Incompatible
from adapterhub_local.registry import Version
from serve.adapters.leases import Leases
from serve.adapters.mixed import mixed_factors
from serve.adapters.mixture import Mixture, label_of
from serve.adapters.reader import AdapterReader
from serve.adapters.record import AdapterStatus, Label, Record, Records, State
from serve.adapters.source import Source
from serve.errors import BadParameter, Busy
from serve.lora.in_place import FactorsInPlace
from serve.lora.product import Factors
from serve.lora.rows import rows_of


@dataclass(frozen=True)
class Hold:
    """One hold on an adapter in memory, by its content digest; `was_read`: its files were read for this very hold."""

    digest: str
    was_read: bool


class AdapterPool:
    """The adapters of one base; those that nobody holds leave first, the least recently used of them first.

    Safe to use from several threads: `acquire` reads files and is meant for a worker, `get` is for the step loop.
    What `leases` keep on disk is what is in memory or was wanted lately.
    """

    def __init__(
        self,
        reader: AdapterReader,
        *,
        max_bytes: int,
        max_pins: int,
        leases: Leases | None = None,
        records: Records | None = None,
    ) -> None:
        self.reader = reader
        self.max_bytes = max_bytes
        self.max_pins = max_pins
        self.num_loads = 0
        self.num_evictions = 0
        self.num_bytes = 0
        self.pinned: frozenset[str] = frozenset()  # digests that have a slot for themselves; replaced, never changed
        self.records = records or Records()
        self._leases = leases
        self._lock: threading.Lock = self.records.lock

    def __len__(self) -> int:
        return sum(record.factors is not None for record in self.records.all())

    def __contains__(self, digest: str) -> bool:
        """Whether an adapter is in memory."""
        record = self.records.get(digest)
        return record is not None and record.factors is not None

    def acquire(self, source: Source | Mixture, *, is_request: bool = False) -> Hold:
        """Have the source's adapter, or the mixture, in memory and hold it there until `release`.

        Raises Incompatible or BadFile, naming modules and tensors, if it does not belong to the base; Corrupt
        if its files are damaged; Busy if all of the budget is in use.
        """
        parts = source.parts if isinstance(source, Mixture) else (source,)
        for part in parts:
            self.reader.check(part)
        for part in parts:
            if isinstance(part, Version):
                self.lease(part)
        with self._lock:
            record = self.records.make(source.content_digest, label_of(source))
            record.num_loading += 1
        try:
            with record.reading:  # the same adapter is read once, different ones side by side
                if is_missing := not self._hold(record):
                    self.insert(record.digest, self._read(source), record.label)
        finally:
            with self._lock:
                record.num_loading -= 1
                self.records.forget(record)
        if is_request:
            with self._lock:
                record.num_requests += 1
                record.last_used = time.time()
                self.records.trim()
        return Hold(record.digest, was_read=is_missing)

    def release(self, digest: str) -> None:
        """Undo one `acquire`."""
        with self._lock:
            record = self.records[digest]
            assert record.users > 0, digest
            record.users -= 1

    def insert(self, digest: str, factors: Factors, label: Label) -> None:
        """Put factors into memory, held once. Raises Incompatible if they can never fit, Busy if they cannot now."""
        factors = self.reader.placed(factors)
        rows = rows_of(factors)
        if isinstance(factors, FactorsInPlace):
            num_bytes = factors.parts.nbytes
        else:
            num_bytes = sum(tensor.nbytes for factor in factors.values() for tensor in factor)
        num_bytes += rows.nbytes if rows is not None else 0
        if num_bytes > self.max_bytes:
            raise Incompatible(
                f"'{label.text}' needs {num_bytes:,} bytes, all adapters may take {self.max_bytes:,}: "
                "start the server with more memory for adapters"
            )
        with self._lock:
            record = self.records.make(digest, label)
            if record.factors is not None:
                record.users += 1
                return
            idle = [each for each in self.records.all() if each.factors is not None and not each.users]
            if self.num_bytes - sum(each.num_bytes for each in idle) + num_bytes > self.max_bytes:
                raise Busy(f"no memory for '{label.text}' while other adapters are in use: try again later")
            while self.num_bytes + num_bytes > self.max_bytes:
                self._evict(idle.pop(0))
                self.num_evictions += 1
            record.factors, record.num_bytes = factors, num_bytes
            record.users += 1
            self.num_bytes += num_bytes
            self.num_loads += 1
            self.records.touch(record)

    def drop(self, digest: str) -> int:
        """Take an adapter that nobody holds out of memory; the bytes that are free now, 0 if it is held or not here."""
        with self._lock:
            record = self.records.get(digest)
            if record is None or record.factors is None or record.users:
                return 0
            freed = self._evict(record)
            self.records.forget(record)
            return freed

    def get(self, digest: str) -> Factors:
        """The factors of an adapter that is held."""
        factors = self.records[digest].factors
        if factors is None:
            raise KeyError(digest)
        return factors

    @contextmanager
    def holding(self, digest: str) -> Iterator[Factors]:
        """The factors of an adapter that is held, and held once more meanwhile."""
        with self._lock:
            record = self.records[digest]
            if record.factors is None:
                raise KeyError(digest)
            record.users += 1
        try:
            yield record.factors
        finally:
            self.release(digest)

    def keep(self, digest: str, name: str, *, pinned: bool) -> None:
        """Turn one hold into that of a name, which lasts until `unkeep`; `pinned`: it has a slot for itself, too.

        Raises Busy if so much is kept already, BadParameter if so much is pinned; the hold is the caller's then.
        """
        with self._lock:
            record, records = self.records[digest], self.records.all()
            # what is held for good may take half of the memory, or nothing else could be served
            if sum(each.num_bytes for each in records if each.holders or each is record) > self.max_bytes // 2:
                raise Busy(
                    "adapters that are held would take more than half of the memory for adapters: unload some first"
                )
            others = {each.digest for each in records if any(each.holders[one] for one in each.holders.keys() - {name})}
            if pinned and len(others | {digest}) > self.max_pins:
                raise BadParameter(
                    f"'{name}' cannot be pinned: {len(others)} are, of {self.max_pins + 1} slots, and one must stay "
                    "free for all others. Unload a pinned one, or start the server with more --max-adapters",
                    "pinned",
                )
            record.users -= name in record.holders  # which had a hold already
            record.holders[name] = pinned
            self._note_pins(records)

    def unkeep(self, digest: str, name: str) -> None:
        """Undo `keep`, and give its hold back."""
        with self._lock:
            record = self.records[digest]
            del record.holders[name]
            record.users -= 1
            self._note_pins(self.records.all())

    @contextmanager
    def draining(self, digest: str) -> Iterator[None]:
        """Show an adapter as draining while its last requests are waited for."""
        with self._lock:
            record = self.records.make(digest)
            record.num_draining += 1
        try:
            yield
        finally:
            with self._lock:
                record.num_draining -= 1
                self.records.forget(record)

    def lease(self, version: Version) -> None:
        """Keep the content of a version on disk while it is in memory, and for some minutes after it was wanted."""
        if self._leases is None:
            return
        with self._lock:
            record = self.records.make(version.content_digest, label_of(version))
            is_leased, record.leased = record.leased is not None, time.monotonic()
        if not is_leased:
            self._leases.take(version)

    def leased(self, since: float) -> set[str]:
        """Digests of what is leased and in memory, or was wanted `since`, a time of the monotonic clock.

        The other leases are forgotten, or a server of many adapters would keep them all forever.
        """
        with self._lock:
            found = set()
            for record in self.records.all():
                if record.leased is not None and (record.factors is not None or record.leased >= since):
                    found.add(record.digest)
                else:
                    record.leased = None
                    self.records.forget(record)
            return found

    def users(self) -> dict[str, int]:
        """Digest -> how often it is held, of every adapter in memory, least recently used first."""
        return {record.digest: record.users for record in self.records.all() if record.factors is not None}

    def status(self, running: Mapping[str, int]) -> list[AdapterStatus]:
        """Every adapter in memory, being read or used since the start; `running`: digest -> its requests now."""
        with self._lock:
            found = [record.status(running.get(record.digest, 0)) for record in self.records.all()]
        order: Sequence[State] = (State.READY, State.DRAINING, State.LOADING, State.ABSENT)
        shown = [each for each in found if each.state is not State.ABSENT or each.num_requests]
        return sorted(shown, key=lambda each: order.index(each.state))

    def _read(self, source: Source | Mixture) -> Factors:
        """The factors of one source; a mixture's are made of its parts', which are held only while that takes."""
        if not isinstance(source, Mixture):
            return self.reader.read(source)
        held: list[str] = []
        try:
            parts = []
            for part, weight in source.terms:
                held.append(self.acquire(part).digest)
                parts.append((self.get(held[-1]), weight))
            return mixed_factors(parts, self.reader.dtype, self.reader.embeddings)
        finally:
            for digest in held:
                self.release(digest)

    def _hold(self, record: Record) -> bool:
        with self._lock:
            if record.factors is None:
                return False
            record.users += 1
            self.records.touch(record)
            return True

    def _evict(self, record: Record) -> int:
        """Take an adapter out of memory, under the lock; its bytes. A slot in place is nothing without them."""
        freed = record.num_bytes
        record.factors, record.num_bytes = None, 0
        if record.slot is not None and record.slot.parts is not None:
            record.slot = None
        self.num_bytes -= freed
        return freed

    def _note_pins(self, records: Sequence[Record]) -> None:
        self.pinned = frozenset(record.digest for record in records if record.is_pinned)
