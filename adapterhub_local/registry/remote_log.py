"""The log of a remote: changes of versions and keys, one record after another, none ever changed.

records/@<n>     the n-th record, created like a slot: of two writers one gets a number, the other the next one
records/at/@<n>  the records that still count after the n-th, so that nobody has to read all from the first one

Whoever writes has read everything before, so that a record says truly what it replaced; readers ask for the next
number, and what they know is what everybody knows who has read as far.
"""

import contextlib
import json
import re
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from adapterhub_local.actor import current_actor
from adapterhub_local.durable import canonical_json
from adapterhub_local.errors import Corrupt, QhubError
from adapterhub_local.registry.remote_kinds import Record, Subject, parse
from adapterhub_local.registry.remote_layout import check_format, prepare
from adapterhub_local.registry.rows import now
from adapterhub_local.registry.store import Store

FOLDER = "records"
KEPT = f"{FOLDER}/at"
KEEP_EVERY = 100  # records
MAX_RECORD_BYTES = 64 << 10
MAX_KEPT_BYTES = 256 << 20
_NUMBER = re.compile(r"@([1-9][0-9]{0,11})")


class Log:
    """The records of a remote as far as they were read. `catch_up` reads on, `append` adds one."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.last = 0  # the number of the last record that was read
        self.unread: dict[int, str] = {}  # records that say nothing to this qhub, and why
        self._records: dict[str | None, dict[Subject, Record]] = defaultdict(dict)  # of each name, None for keys
        self._lock = threading.Lock()  # for readers in other threads than the one that reads on
        self._is_begun = False

    def get(self, kind: str, *about: Any) -> Record | None:
        """The last record about a subject: its kind, then what it is about."""
        with self._lock:
            for name in (about[0], None):
                if (found := self._records.get(name, {}).get((kind, *about))) is not None:
                    return found
        return None

    def all(self, kind: str, name: str | None = None) -> list[Record]:
        """What counts of a kind, and of one name if one is given, in the order of the log."""
        with self._lock:
            groups = self._records.values() if name is None else (self._records.get(name, {}),)
            found = [one for group in groups for one in group.values() if one.kind == kind]
        return sorted(found, key=lambda one: one.number)

    def since(self, number: int) -> list[Record]:
        """What counts and came after a record, without asking the remote."""
        return [one for one in self._everything() if one.number > number] if number < self.last else []

    def catch_up(self) -> list[Record]:
        """Read what was added, and return it. Raises RemoteError; Corrupt if a record is gone."""
        if not self._is_begun:
            return self._begin()
        return self._read_on()

    def append(self, kind: str, make: Callable[[], dict[str, Any] | None]) -> Record | None:
        """Add a record whose fields `make` gives when everything before it was read; none if it gives None.

        `make` may raise, and is called again if somebody else was faster: what it looks at is then still true when
        its record is written.
        """
        self.store.check_writable()
        prepare(self.store)
        by, own = current_actor(), uuid.uuid4().hex
        while True:
            self.catch_up()
            fields = make()
            if fields is None:
                return None
            number = self.last + 1
            # with a mark of its own no record has the bytes of another, so that nobody takes another's for their own
            value = {"kind": kind, "by": by, "at": now(), "id_of_record": own, **fields}
            record = parse(number, json.loads(canonical_json(value)))
            if self.store.create(f"{FOLDER}/@{number}", canonical_json(value)):
                self.catch_up()
                self._keep(number)
                return record

    def every(self) -> Iterator[Record]:
        """All records from the first that can be read, also those that count no more. Raises as `catch_up`."""
        self.catch_up()
        for number in range(1, self.last + 1):
            if (raw := self._raw(number)) is None:
                raise Corrupt(f"{self.store.url}/{FOLDER}/@{number} is missing: what it recorded cannot be known")
            try:
                yield self._parsed(number, raw)
            except ValueError as error:
                self.unread[number] = str(error)

    def _begin(self) -> list[Record]:
        kept, highest = self._highest(KEPT), self._highest(FOLDER)
        if kept:
            raw = self.store.read(f"{KEPT}/@{kept}", MAX_KEPT_BYTES)
            try:
                for entry in json.loads(raw):
                    self._take(parse(entry.pop("record"), entry))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise Corrupt(f"{self.store.url}/{KEPT}/@{kept} cannot be read ({error}): remove it") from None
            self.last = kept
        self._read_on()
        if self.last < highest:
            raise Corrupt(
                f"{self.store.url}/{FOLDER}/@{self.last + 1} is gone, though there is @{highest}: bring it back from a "
                "backup, or the changes since cannot be known"
            )
        self._is_begun = True
        return self._everything()

    def _read_on(self) -> list[Record]:
        found = []
        while (raw := self._raw(self.last + 1)) is not None:
            try:
                record = self._parsed(self.last + 1, raw)
            except ValueError as error:
                self.unread[self.last + 1] = str(error)
            else:
                self._take(record)
                found.append(record)
            self.last += 1
        return found

    def _raw(self, number: int) -> bytes | None:
        try:
            return self.store.read(f"{FOLDER}/@{number}", MAX_RECORD_BYTES)
        except FileNotFoundError:
            return None
        except Corrupt:  # larger than any of ours
            return b""

    def _parsed(self, number: int, raw: bytes) -> Record:
        try:
            return parse(number, json.loads(raw))
        except RecursionError:
            raise ValueError("it is nested too deeply") from None

    def _take(self, record: Record) -> None:
        with self._lock:
            known = self._records[record.fields.get("name")]
            before = known.get(record.subject)
            if before is None or before.number < record.number:
                known[record.subject] = record

    def _everything(self) -> list[Record]:
        with self._lock:
            found = [one for group in self._records.values() for one in group.values()]
        return sorted(found, key=lambda one: one.number)

    def _highest(self, folder: str) -> int:
        numbers = (_NUMBER.fullmatch(path) for path in self.store.names(folder))
        return max((int(match[1]) for match in numbers if match), default=0)

    def _keep(self, number: int) -> None:
        """Write down now and then what counts; whoever does it writes the same."""
        if number % KEEP_EVERY == 0 and number == self.last:
            text = canonical_json([one.to_json() for one in self._everything()])
            with contextlib.suppress(QhubError):  # it only saves time
                self.store.create(f"{KEPT}/@{number}", text)


def open_log(store: Store) -> Log:
    """The log of a remote, read to its end. Raises RemoteError, Corrupt, InputError for a newer qhub's."""
    check_format(store)
    log = Log(store)
    log.catch_up()
    return log
