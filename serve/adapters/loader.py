"""SlotLoader: adapters go from host memory into slots in a thread of its own, while the running requests continue.

Nothing but this thread writes to the stacks. A step reads the slots of its own requests only, which are left alone.
"""

import logging
import threading
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack

import torch

from serve.adapters.pool import AdapterPool
from serve.adapters.record import Record
from serve.adapters.slots import Slots
from serve.threads import compute_alone

logger = logging.getLogger(__name__)


class SlotLoader:
    """Fills slots with what is wanted.

    `wanted` names the adapters that should have a slot now, no more than there are slots but for those that run or are
    pinned; it is asked under `lock`, under which none may begin to run meanwhile. `between_steps` keeps steps out
    for as short as it takes to exchange stacks.
    """

    def __init__(
        self,
        slots: Slots,
        pool: AdapterPool,
        wanted: Callable[[], Collection[str]],
        lock: threading.Lock,
        between_steps: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.slots = slots
        self.pool = pool
        self.wanted = wanted
        self.lock = lock
        self.between_steps = between_steps
        self._worker = ThreadPoolExecutor(1, "slots", compute_alone)
        self._filling: list[Record] = []

    def prefetch(self) -> dict[str, BaseException]:
        """Begin to load what is wanted and not there, under `lock`; why others could not be loaded, by digest."""
        failed: dict[str, BaseException] = {}
        for record in list(self._filling):
            if record.filling is not None and record.filling.done():
                if error := record.filling.exception():
                    failed[record.digest] = error
                record.filling = None
                self._filling.remove(record)
        for digest in self.wanted():
            record = self.pool.records[digest]
            if record.slot is None and record.filling is None and digest not in failed:
                record.filling = self._worker.submit(self._fill, digest)
                self._filling.append(record)
        return failed

    def wait(self, seconds: float) -> None:
        """Until an adapter that is being loaded is there, or could not be loaded."""
        wait([each.filling for each in list(self._filling) if each.filling is not None], seconds, FIRST_COMPLETED)

    def drop(self, digest: str, is_used: Callable[[], bool]) -> int:
        """Free slot and memory of an adapter, unless it is used by then; the bytes that are free now."""
        return self._worker.submit(self._drop, digest, is_used).result()

    @torch.inference_mode()
    def _fill(self, digest: str) -> None:
        with ExitStack() as stack:
            with self.lock:
                wanted = set(self.wanted())
                if digest not in wanted or digest in self.slots:
                    return
                # until it is in its slot: whoever waits for it may leave, and others need its memory
                factors = stack.enter_context(self.pool.holding(digest))
                if not self.slots.make_room(factors, wanted):
                    return  # until one that runs has ended
            self.slots.put(digest, factors, wanted, self.between_steps)

    @torch.inference_mode()
    def _drop(self, digest: str, is_used: Callable[[], bool]) -> int:
        with self.lock:
            if is_used():
                return 0
            before = self.slots.num_bytes
            slot = self.slots.free(digest)
        if slot is not None:
            self.slots.compact(slot.rank, self.between_steps)
        return before - self.slots.num_bytes + self.pool.drop(digest)
