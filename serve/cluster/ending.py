"""Ending: a process of Ray that gets SIGTERM notices it, instead of ending at once.

Ray installs a handler of SIGTERM of its own, in the main thread, which it keeps; an actor's code runs in other threads,
where Python's `signal` refuses to work. What does work there is `faulthandler.register`: it writes to a file when a
signal comes. The file is a pipe here, and what is written of no interest.
"""

import asyncio
import faulthandler
import os
import signal
from collections.abc import Callable
from typing import IO

_pipes: list[IO[bytes]] = []  # kept open as long as the process lives


def at_sigterm(told: Callable[[], None]) -> None:
    """Have `told` called in the running loop each time the process gets SIGTERM, which ends it no longer."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    end = os.fdopen(write, "wb", buffering=0)
    _pipes.append(end)
    faulthandler.register(signal.SIGTERM, file=end, all_threads=False, chain=False)

    def ready() -> None:
        os.read(read, 1 << 16)
        told()

    asyncio.get_running_loop().add_reader(read, ready)
