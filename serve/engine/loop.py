"""EngineLoop: a thread that steps the engine while there is work, and hands tokens to asyncio."""

import asyncio
import logging
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from serve.engine.engine import Engine
from serve.engine.request import Request, Submission, TokenOutput
from serve.errors import Busy, DeviceLost, EngineEnded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listener:
    """Where the outputs of one request go."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[TokenOutput]


class EngineLoop:
    """Runs one engine in its own thread from `start` to `stop`; a step is made inside `turns`."""

    def __init__(self, engine: Engine, turns: AbstractContextManager[None] | None = None) -> None:
        self.engine = engine
        self._turns = turns or nullcontext()
        self._listeners: dict[str, Listener] = {}
        self._wake = threading.Condition()
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._is_stopping

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the present step; every listener that still waits gets an error."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        for request_id in list(self._listeners):
            self._send([TokenOutput(request_id, None, error=EngineEnded("the server is stopping"))])

    def submit(self, *asked: Submission) -> asyncio.Queue[TokenOutput]:
        """Queue requests, all or none; their outputs come, mixed, out of the queue returned.

        Raises as `Engine.submit`, and Busy while the loop stops.
        """
        if not self.is_alive:
            raise Busy("the server is stopping: try again later")
        listener = Listener(asyncio.get_running_loop(), asyncio.Queue())
        self._listeners.update({each.id: listener for each in asked})
        try:
            self.engine.submit(*map(Request.of, asked))
        except Exception:
            for each in asked:
                self._listeners.pop(each.id, None)
            raise
        with self._wake:
            self._wake.notify()
        return listener.queue

    def abort(self, request_id: str) -> None:
        """End a request that nobody listens to any more; nothing if it has ended."""
        self._listeners.pop(request_id, None)
        self.engine.abort(request_id)
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self.engine.has_work:
                    self._wake.wait_for(lambda: self._is_stopping or self.engine.has_work)
                    self.engine.runner.resume()
            if self._is_stopping:
                return
            try:
                with self._turns:
                    outputs = self.engine.step()
                self._send(outputs)
            except DeviceLost as error:
                logger.critical("%s", error)
                self._is_stopping = True  # so that no request is taken any more, and whoever watches /health knows
                ended = EngineEnded("the server failed on this request; its log says why")
                self._send(self.engine.fail_all(ended))
                return
            except Exception:
                # a step fails its requests one by one; what reaches this place is a mistake of ours, which
                # would come again with the same requests: they end, the loop lives
                logger.exception("the engine's step failed")
                self._send(self.engine.fail_all())

    def _send(self, outputs: list[TokenOutput]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[TokenOutput], TokenOutput]]] = {}
        for output in outputs:
            listener = self._listeners.get(output.request_id)
            if listener is None:
                continue
            if output.is_last:
                self._listeners.pop(output.request_id, None)
            by_loop.setdefault(listener.loop, []).append((listener.queue, output))
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, deliveries)
            except RuntimeError:  # that event loop was closed: nobody listens there
                logger.debug("%d outputs had no listener", len(deliveries))


def _deliver(deliveries: list[tuple[asyncio.Queue[TokenOutput], TokenOutput]]) -> None:
    for queue, output in deliveries:
        queue.put_nowait(output)
