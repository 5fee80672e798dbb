"""Uses: what each adapter's content was used for since the server started, and under which name."""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

MAX_REMEMBERED = 10_000  # adapters


@dataclass
class Use:
    """What one adapter was used for; `last_used` in seconds since the epoch, 0 if it was only begun to be read."""

    name: str
    num_requests: int = 0
    last_used: float = 0.0

    @property
    def last_time(self) -> str | None:
        """`last_used` as text, UTC."""
        if not self.last_used:
            return None
        return datetime.fromtimestamp(self.last_used, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Uses:
    """Uses by content digest, the latest last; the oldest are forgotten. Safe to use from several threads."""

    def __init__(self) -> None:
        self._uses: OrderedDict[str, Use] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def noted(self, digest: str, name: str) -> Iterator[None]:
        """Count one use, if what is done meanwhile succeeds; while it is done there is a name to show already."""
        with self._lock:
            use = self._uses.setdefault(digest, Use(name))
        try:
            yield
        except BaseException:
            with self._lock:
                if not use.num_requests:
                    self._uses.pop(digest, None)
            raise
        with self._lock:
            use = self._uses.setdefault(digest, use)
            use.num_requests += 1
            use.last_used = time.time()
            self._uses.move_to_end(digest)
            while len(self._uses) > MAX_REMEMBERED:
                self._uses.popitem(last=False)

    def name(self, digest: str) -> str:
        """The name under which an adapter was asked for first, or its digest."""
        use = self._uses.get(digest)
        return use.name if use is not None else digest

    def all(self) -> dict[str, Use]:
        """Digest -> use."""
        with self._lock:
            return dict(self._uses)
