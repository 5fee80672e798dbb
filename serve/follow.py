"""Follow a remote: a home becomes what the remote says, within two seconds, and may be lost without losing anything.

A thread of its own asks for the next record of the remote's log. Keys count at once; an alias or a split counts when
the versions that it needs are here. Names that were never asked are left at the remote until somebody does. While the
remote is away, what is here is still served.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from adapterhub_local.durable import alone, replacing
from adapterhub_local.errors import Incompatible, NotFound, QhubError, RemoteError
from adapterhub_local.keys import Keys
from adapterhub_local.refs import Reference
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.pull import pull
from adapterhub_local.registry.remote_layout import MARKER, all_numbers, check_format
from adapterhub_local.registry.remote_log import Log
from adapterhub_local.registry.remote_marks import Taken, local_version, take_keys, take_marks
from adapterhub_local.registry.remote_moves import aliases_at, number_of
from adapterhub_local.registry.remotes import Remote
from adapterhub_local.registry.store import open_store
from adapterhub_local.settings import make_folder

logger = logging.getLogger(__name__)
INTERVAL = 0.5  # seconds between looks at the remote
ALL_AGAIN = 5.0  # seconds after which all is compared, not only what is new: what was changed here is put back
REFUSED_FOR = 30.0  # seconds in which what could not be taken is not tried again
FETCHES = 4  # versions that are fetched at the same time


@dataclass(frozen=True)
class Refused:
    """A version of the remote that this server does not take, and why; `until` it is not tried again."""

    error: QhubError
    until: float


class Follower:
    """Keeps a home as a remote says. `fits` raises for versions that this server could not serve.

    `begin` first, in the caller's thread; then `start`, and `stop`. The others may be called by many threads.
    """

    def __init__(
        self,
        registry: Registry,
        remote: Remote,
        fits: Callable[[Version], None] = lambda _: None,
        *,
        interval: float = INTERVAL,
    ) -> None:
        self.registry = registry
        self.remote = remote
        self.fits = fits
        self.interval = interval
        self._keys = Keys(registry.home)
        self._log: Log | None = None
        self._error: str | None = None
        self._away_since: str | None = None
        self._seen = 0  # the last record that counts here
        self._compared = float("-inf")
        self._watched: set[str] = set()  # names whose records count here
        self._settled: set[str] = set()  # those of them that are here as the remote says
        self._undone: set[str] = set()  # names of which something did not come, or cannot be
        self._written: dict[tuple[str, str], Any] = {}  # kind and subject -> what was last written here of it
        self._logged: dict[str, str] = {}  # name -> what was logged of it last
        self._slots: dict[str, list[int]] = {}  # name -> numbers that were at the remote at the start
        self._refused: dict[tuple[str, int], Refused] = {}
        self._fetching: dict[tuple[str, int], Future[None]] = {}
        self._marks = threading.RLock()  # what an earlier record says is never written over what a later one says
        self._lock = threading.Lock()
        self._fetches = ThreadPoolExecutor(FETCHES, "follow")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Have keys, and all names that are here, as the remote says.

        Raises what reading it raises, unless this home has followed it before: then it continues with what it has.
        """
        names = self.registry.names()
        try:
            self._look()
            needed = [(name, number) for name in names for number in self._needed(name)]
            if (failed := self._wait(needed)) is not None:
                raise failed
            for name in names:
                self._settle(name)
        except QhubError as error:
            if not self._was_followed():
                raise
            self._say_away(error)
        else:
            self._note_followed()
        self._watched |= set(names)
        self._settled |= set(names)

    def start(self) -> None:
        """Follow, until `stop`."""
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Follow no longer; versions that are on their way are not waited for."""
        self._stop.set()
        self._fetches.shutdown(wait=False, cancel_futures=True)
        if self._thread is not None:
            self._thread.join()

    def is_new(self, names: Iterable[str]) -> bool:
        """Whether one of these names has to be brought first. Takes no time."""
        return not self._settled.issuperset(names)

    def bring(self, names: Iterable[str]) -> None:
        """Have these names here as the remote says, as far as it knows them: newest version, aliases, split.

        Waits for their versions. One that this server cannot take is missing then, and `fetch` says why. Raises
        RemoteError if the remote stops answering meanwhile.
        """
        for name in set(names) - self._settled:
            if self._log is None or not self._numbers(name):
                continue
            self._watched.add(name)  # first, so that no record falls between what is looked at here and by `_look`
            if (failed := self._wait((name, number) for number in self._needed(name))) is not None:
                raise failed
            self._settle(name)
            if self._has(name):
                self._settled.add(name)

    def fetch(self, references: Iterable[Reference]) -> bool:
        """Have these versions here, which the home lacks; whether any came. Raises why one that is there does not."""
        has_come = False
        for reference in references:
            if self._is_here(reference):
                continue
            number = self._number(reference)
            if number is None and self.is_away:
                where = f"remote '{self.remote.name}'"
                raise RemoteError(f"'{reference}' is not here, and {where} does not answer: try again soon")
            if number is not None:
                self._fetch(reference.name, number).result()
                self._settle(reference.name)
                has_come = True
        return has_come

    def state(self) -> dict[str, Any]:
        """What is followed, how far, and what is wrong with it."""
        now = time.monotonic()
        refused = {f"{name}@{number}": str(one.error) for (name, number), one in list(self._refused.items())
                   if one.until > now}  # fmt: skip
        log = self._log
        return {
            "name": self.remote.name,
            "records": log.last if log is not None else None,
            "state": "away" if self._away_since else "following",
            "away_since": self._away_since,
            "reason": self._error,
            "refused": refused,
            "unread": {str(number): reason for number, reason in log.unread.items()} if log is not None else {},
        }

    @property
    def is_away(self) -> bool:
        """Whether the remote did not answer when it was last asked."""
        return self._away_since is not None

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self._look()
            except QhubError as error:
                self._say_away(error)
            except Exception:
                logger.exception("following %s failed: it is tried again", self.remote.name)
            else:
                self._say_back()

    def _look(self) -> None:
        """Read what is new, and have it count here. Raises RemoteError, NotFound, Corrupt."""
        log = self._log or self._open()
        log.catch_up()
        new = log.since(self._seen)
        if not new and log.last and log.store.size(MARKER) is None:
            raise RemoteError(f"{log.store.url} has lost what it had")
        names = {record.fields["name"] for record in new if "name" in record.fields} & self._watched
        self._undone |= names  # whatever fails below
        is_due = self._compared + ALL_AGAIN < time.monotonic()
        if is_due or any(record.kind in ("key", "revocation") for record in new):
            take_keys(self._keys, log)
        self._seen = log.last
        if is_due:
            names |= self._undone
            for name in self._differing(log) - names:
                if any(taken.reason for taken in self._settle(name, is_moved=True)):
                    self._undone.add(name)
            self._compared = time.monotonic()
        for name in names:
            self._undone.discard(name)
            self._settle_soon(name)
            for number in self._needed(name):
                self._fetch(name, number).add_done_callback(partial(self._settle_soon, name))

    def _differing(self, log: Log) -> set[str]:
        """Names that were brought and of which an alias or the split is not what the remote says any more."""
        rows = self.registry.database.rows
        here = {(row["name"], row["alias"]): row["number"] for row in rows("SELECT name, alias, number FROM aliases")}
        splits: dict[str, list[list[Any]]] = {}
        for row in rows("SELECT name, alias, share FROM splits ORDER BY name, place"):
            splits.setdefault(row["name"], []).append([row["alias"], row["share"]])
        found = {
            record.fields["name"]
            for record in log.all("alias")
            if here.get((record.fields["name"], record.fields["alias"])) != record.fields["number"]
        }
        for record in log.all("split"):
            if splits.get(record.fields["name"], []) != record.fields["shares"]:
                found.add(record.fields["name"])
        return found & self._watched

    def _open(self) -> Log:
        store = open_store(self.remote)
        if not check_format(store) and self._was_followed():
            raise RemoteError(f"{store.url} has lost what it had")
        log = Log(store)
        log.catch_up()
        self._slots = all_numbers(store)
        self._log = log
        return log

    def _settle(self, name: str, *, is_moved: bool = False) -> list[Taken]:
        """Aliases, split, tags and evaluations of a name, as far as their versions are here; what changed.

        What was moved here is undone and named: what was here is not what was last written. Of a split that was never
        written `is_moved` says whether it was moved here.
        """
        if self._log is None:
            return []
        with self._marks:
            found = take_marks(self.registry, self._log, name)
            for taken in found:
                key = (taken.kind, taken.subject)
                if taken.reason is not None or taken.kind not in ("alias", "split"):
                    continue
                if self._written[key] != taken.before if key in self._written else is_moved and taken.kind == "split":
                    logger.warning(
                        "%s %s was moved here and is put back to what remote %s says (%s): move it there, with "
                        "`qhub sync push`", *key, self.remote.name, taken.now,
                    )  # fmt: skip
                self._written[key] = taken.now
            for alias, number in self.registry.aliases(name).items():  # also those that came with their version
                self._written.setdefault(("alias", f"{name}@{alias}"), number)
            return found

    def _settle_soon(self, name: str, fetched: Future[None] | None = None) -> None:
        """The same, again later if it cannot be done or if what was fetched for it did not come."""
        if fetched is not None and (fetched.cancelled() or fetched.exception() is not None):
            self._undone.add(name)
        try:
            self._settle(name)
        except QhubError as error:
            self._undone.add(name)
            if self._logged.get(name) != str(error):
                logger.warning("%s is not as remote %s says yet: %s", name, self.remote.name, error)
            self._logged[name] = str(error)

    def _numbers(self, name: str) -> set[int]:
        """The versions of a name that the remote has, as far as it was read."""
        log = self._reading()
        # of those that were sent by a qhub that wrote no log, the ones that were there at the start
        return {record.fields["number"] for record in log.all("version", name)} | set(self._slots.get(name, ()))

    def _needed(self, name: str) -> list[int]:
        """Of a name's versions those that must be here and are not: the newest, and what aliases point to."""
        log, known = self._reading(), self._numbers(name)
        wanted = {max(known)} if known else set()
        wanted |= {record.fields["number"] for record in aliases_at(log, name)}
        return [number for number in sorted(wanted) if local_version(self.registry, log, name, number) is None]

    def _number(self, reference: Reference) -> int | None:
        """What a reference names at the remote, None if it names nothing there."""
        if self._log is None:
            return None
        log, name, known = self._log, reference.name, self._numbers(reference.name)
        if reference.alias is not None:
            return number_of(log, name, reference.alias)
        if reference.digest is not None:
            digests = {one.fields["manifest"]: one.fields["number"] for one in log.all("version", name)}
            return next((digests[one] for one in digests if one.startswith(reference.digest)), None)
        if reference.version is None:
            return max(known, default=None)
        return reference.version if reference.version in known else None

    def _has(self, name: str) -> bool:
        return bool(self.registry.database.rows("SELECT 1 FROM versions WHERE name = ? LIMIT 1", (name,)))

    def _is_here(self, reference: Reference) -> bool:
        try:
            self.registry.resolve(reference)
        except NotFound:
            return False
        return True

    def _reading(self) -> Log:
        if self._log is None:
            raise RemoteError(f"remote '{self.remote.name}' does not answer: {self._error or 'it was not read yet'}")
        return self._log

    def _wait(self, versions: Iterable[tuple[str, int]]) -> BaseException | None:
        """Fetch versions, and wait until all are here or refused; why one is neither, if so."""
        waiting = [(version, self._fetch(*version)) for version in versions]
        errors = [(version, future.exception()) for version, future in waiting]
        return next((error for version, error in errors if error is not None and version not in self._refused), None)

    def _fetch(self, name: str, number: int) -> Future[None]:
        """A version that is on its way; the same for all who ask for it meanwhile."""
        key = (name, number)
        with self._lock:
            refused = self._refused.get(key)
            if refused is not None and refused.until > time.monotonic():
                failed: Future[None] = Future()
                failed.set_exception(refused.error)
                return failed
            future = self._fetching.get(key)
            if future is None:
                future = self._fetching[key] = self._fetches.submit(self._pull, name, number)
            return future

    def _pull(self, name: str, number: int) -> None:
        key = (name, number)
        try:
            log = self._reading()
            # of several processes that follow into this home one fetches, the others wait for it
            with alone(self.registry.home.tmp / f"follow-{name.replace('/', '+')}@{number}"):
                if local_version(self.registry, log, name, number) is not None:
                    return
                *_, moved = pull(self.registry, log.store, Reference(name, version=number), accept=self.fits)
            if moved.target != moved.source:
                logger.warning(
                    "%s of %s is %s here: this home has versions of its own under that name, whose numbers count",
                    moved.source,
                    self.remote.name,
                    moved.target,
                )
            self._refused.pop(key, None)
        except QhubError as error:
            before = self._refused.get(key)
            if not isinstance(error, RemoteError):
                self._refused[key] = Refused(error, time.monotonic() + REFUSED_FOR)
            # adapters of other bases are nothing out of the ordinary
            if not isinstance(error, Incompatible) and (before is None or str(before.error) != str(error)):
                logger.warning("%s@%d of %s is not taken: %s", name, number, self.remote.name, error)
            raise
        except Exception:
            logger.exception("%s@%d of %s could not be fetched", name, number, self.remote.name)
            raise
        finally:
            with self._lock:
                self._fetching.pop(key, None)

    def _say_away(self, error: QhubError) -> None:
        self._error = str(error)
        if self._away_since is None:
            self._away_since = datetime.now(UTC).isoformat(timespec="seconds")
            logger.error("remote %s cannot be followed, what is here is still served: %s", self.remote.name, error)

    def _say_back(self) -> None:
        if self._away_since is not None:
            logger.warning("remote %s is followed again", self.remote.name)
        self._away_since = self._error = None

    def _was_followed(self) -> bool:
        try:
            return self.remote.url in self._followed.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False

    def _note_followed(self) -> None:
        """Remember that this home has what the remote says, which is better than nothing when it is away."""
        if not self._was_followed():
            make_folder(self._followed.parent)
            before = self._followed.read_text(encoding="utf-8") if self._followed.exists() else ""
            with replacing(self._followed) as staged:
                staged.write_text(f"{before}{self.remote.url}\n", encoding="utf-8")

    @property
    def _followed(self) -> Any:
        return self.registry.home.root / "followed"
