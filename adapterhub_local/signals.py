"""Signals handled for the length of a block, and given back afterwards."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def handling(
    numbers: Sequence[signal.Signals], handler: Callable[[int, Any], None], *, ignored_too: bool = False
) -> Iterator[None]:
    """Within, `handler` gets these signals; afterwards they go where they went before.

    Signals that are ignored, as nohup has it, stay so unless `ignored_too`. Outside of the main thread, where Python
    cannot set handlers, the block just runs.
    """
    before: dict[signal.Signals, Any] = {}
    try:
        for number in numbers:
            if ignored_too or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)
