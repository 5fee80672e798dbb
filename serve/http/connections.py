"""Connections: as many as this process may have open, and none that is kept by a client who does not ask."""

import asyncio
import contextlib
import resource

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0  # in which a request's headers must have come, from when the connection was made or they began


class ImpatientProtocol(H11Protocol):
    """uvicorn's protocol, which waits for the headers of a request forever, with an end to that."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Be patient while no request has begun; not again with every byte of one that has not."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_watch()
        elif self._patience is None:
            self._patience = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _stop_watch(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        # between two requests of a connection that is kept it is uvicorn's time that counts
        if self.timeout_keep_alive_task is None and self.conn.their_state is h11.IDLE:
            self.transport.close()


def allow_connections() -> None:
    """Open as many files and connections as the system lets this process, instead of the usual 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
