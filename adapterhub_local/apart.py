"""Work in a process of its own: whatever it does there, only that process ends.

The program is run, not imported. It reads messages from standard input (4 bytes, big-endian, then that many) and
answers each on standard output in the same form.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

HEAD = 4  # bytes that say how long a message is


class Died(Exception):
    """The process ended, or had to be ended: by which signal (0 for none), or `is_late` because it did not answer."""

    def __init__(self, number: int, *, is_late: bool = False) -> None:
        super().__init__("no answer" if is_late else f"signal {number}")
        self.number, self.is_late = number, is_late


class Apart:
    """One such process, for one thread at a time. A terminal's signals do not reach it; it ends with its parent."""

    def __init__(self, program: Path, *arguments: str) -> None:
        # -P: what lies beside the program is not to be taken for the standard library
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(program), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, process_group=0,
        )  # fmt: skip

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: bytes) -> None:
        """One message. Raises Died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(len(message).to_bytes(HEAD, "big") + message)
            self._process.stdin.flush()
        except OSError:
            self._bury()

    def receive(self, seconds: float) -> bytes:
        """The next message from it. Raises Died where none comes within this many seconds of the clock."""
        deadline = time.monotonic() + seconds
        return self._read(int.from_bytes(self._read(HEAD, deadline), "big"), deadline)

    def close(self) -> None:
        """End it, and what it has started, whatever they do."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # something was not sent yet
                    pipe.close()

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        file, found = self._process.stdout.fileno(), bytearray()
        poll = select.poll()  # select() knows the first 1,024 files only
        poll.register(file, select.POLLIN)
        while len(found) < size:
            ready = poll.poll(1000 * max(0.0, deadline - time.monotonic()))
            part = os.read(file, size - len(found)) if ready else b""
            if not part:
                self._bury(is_late=not ready)
            found += part
        return bytes(found)

    def _bury(self, *, is_late: bool = False) -> None:
        if not is_late:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                is_late = True
        number = -(self._process.returncode or 0)
        self.close()
        raise Died(max(0, number), is_late=is_late)
