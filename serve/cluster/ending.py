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


def at_sigterm(end: Callable[[], None]) -> None:
    """Have `end` called once, in the running loop, when the process gets SIGTERM, which ends it no longer.

    Once, however often the signal comes: what faulthandler writes for one signal arrives in several pieces, so signals
    cannot be counted, and who ends a process twice wants the same as who ends it once.
    """
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    pipe = os.fdopen(write, "wb", buffering=0)
    _pipes.append(pipe)
    faulthandler.register(signal.SIGTERM, file=pipe, all_threads=False, chain=False)
    loop = asyncio.get_running_loop()

    def ready() -> None:
        loop.remove_reader(read)
        end()

    loop.add_reader(read, ready)
