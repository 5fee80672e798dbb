"""Leases on what this server has in memory or used lately, so that no garbage collection takes it away meanwhile.

A lease ends by itself some minutes after a crash. A registry that cannot be written is served without.
"""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Set

from adapterhub_local.errors import QhubError
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.gc import lease, release, renew

LEASE_SECONDS = 600.0
logger = logging.getLogger(__name__)


class Leases:
    """The leases of one server, renewed by a thread between `start` and `stop`."""

    def __init__(
        self, registry: Registry, seconds: float = LEASE_SECONDS, in_memory: Callable[[], Set[str]] = frozenset
    ) -> None:
        self.registry = registry
        self.seconds = seconds
        self._in_memory = in_memory  # the digests of adapters that are loaded now
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._used: dict[str, float] = {}  # digest -> when it was last held, on the monotonic clock
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def hold(self, version: Version) -> None:
        """Keep the content of `version` while it is in memory, and for some minutes after its last use."""
        with self._lock:
            is_leased = version.content_digest in self._used
            self._used[version.content_digest] = time.monotonic()
        if is_leased:
            return
        try:
            lease(self.registry, version, self.holder, self.seconds)
        except QhubError as error:
            logger.warning("%s is served without a lease, once removed `qhub gc` may collect it: %s", version, error)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._renew, name="leases", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give everything back. Safe to call twice."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._used:
            try:
                release(self.registry, self.holder)
            except QhubError as error:
                logger.warning("the leases end by themselves in %.0f s: %s", self.seconds, error)

    def _renew(self) -> None:
        while not self._stopped.wait(self.seconds / 3):
            try:
                renew(self.registry, self._needed(), self.holder, self.seconds)
            except QhubError as error:
                logger.warning("leases were not renewed, which is tried again: %s", error)

    def _needed(self) -> set[str]:
        """What is still leased; the rest is forgotten, or a server of many adapters would keep them all for ever."""
        oldest, loaded = time.monotonic() - self.seconds, self._in_memory()
        with self._lock:
            self._used = {digest: used for digest, used in self._used.items() if digest in loaded or used >= oldest}
            return set(self._used)
