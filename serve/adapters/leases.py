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
    """The leases of one server, renewed by a thread between `start` and `stop`; on what, the pool's records know."""

    def __init__(self, registry: Registry, seconds: float = LEASE_SECONDS) -> None:
        self.registry = registry
        self.seconds = seconds
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._has_taken = False
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, version: Version) -> None:
        """Begin a lease on the content of `version`."""
        self._has_taken = True
        try:
            lease(self.registry, version, self.holder, self.seconds)
        except QhubError as error:
            logger.warning("%s is served without a lease, once removed `qhub gc` may collect it: %s", version, error)

    def start(self, wanted: Callable[[float], Set[str]]) -> None:
        """Renew from now on what `wanted` names: the digests that are loaded, or were wanted since a time."""
        self._thread = threading.Thread(target=self._renew, args=(wanted,), name="leases", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give everything back. Safe to call twice."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._has_taken:
            try:
                release(self.registry, self.holder)
            except QhubError as error:
                logger.warning("the leases end by themselves in %.0f s: %s", self.seconds, error)

    def _renew(self, wanted: Callable[[float], Set[str]]) -> None:
        while not self._stopped.wait(self.seconds / 3):
            try:
                renew(self.registry, wanted(time.monotonic() - self.seconds), self.holder, self.seconds)
            except QhubError as error:
                logger.warning("leases were not renewed, which is tried again: %s", error)
