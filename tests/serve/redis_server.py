"""A real Redis of one's own, at a unix socket, empty and without a file; skipped where Debian's package is missing."""

import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.patience import PATIENCE


class RedisServer:
    """A Redis that can be stopped and started again."""

    def __init__(self, password: str = "") -> None:
        self.password = password
        self.program = shutil.which("redis-server")
        if self.program is None:
            pytest.skip("needs Debian's redis-server: apt-get install redis-server")
        self.folder = Path(tempfile.mkdtemp(prefix="redis-"))  # short: a socket's path has at most 107 bytes
        self.socket = self.folder / "s"
        self.url = f"unix://{self.socket}"
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        options = {"port": 0, "unixsocket": self.socket, "dir": self.folder, "save": "", "appendonly": "no"}
        options |= {"requirepass": self.password} if self.password else {}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self.process = subprocess.Popen([self.program, *words], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert time.monotonic() < deadline
            assert self.process.poll() is None
            time.sleep(0.01)

    def _answers(self) -> bool:
        """Whether it takes connections: its socket is there a moment before."""
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.socket)) == 0

    def stop(self) -> None:
        """Stop; what it counted is lost."""
        self.process.terminate()
        self.process.wait(20)
        self.socket.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop for good."""
        self.stop()
        shutil.rmtree(self.folder)
