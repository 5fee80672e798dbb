"""A real server in a process of its own, and somebody who asks it the whole time while it is attacked."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.patience import PATIENCE

ORDINARY = {"model": "tiny", "prompt": "Hello", "max_tokens": 1, "temperature": 0}


class AttackedServer:
    """`python -m serve` on a home with the base `tiny`."""

    def __init__(self, home: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "serve", "--port", "0", "--max-rows", "4", "--max-length", "256"]
        environment = {**os.environ, "QHUB_HOME": str(home), "QHUB_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        self.log = home / "serve.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=log, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert "http://" in line, self.log.read_text()
        self.url = line.split()[-1].removesuffix("/v1")
        self.port = int(self.url.rpartition(":")[2])
        self.http = httpx.Client(base_url=self.url, timeout=120, trust_env=False)
        self.longest: dict[str, float] = {}  # attack -> how long somebody else waited meanwhile at most, in seconds

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def answers(self) -> bool:
        """Whether an ordinary request is answered."""
        return self.http.post("/v1/completions", json=ORDINARY).status_code == 200

    def told(self) -> str:
        """What others had of the attacks, in a line."""
        waits = sorted((wait, name) for name, wait in self.longest.items())
        if not waits:
            return "no attacks"
        late = sum(wait > 0.3 for wait, _ in waits)
        return (
            f"{len(waits)} attacks on a server: others waited {waits[-1][0]:.2f} s at most ({waits[-1][1]}), "
            f"{waits[len(waits) // 2][0]:.3f} s in the median, {late} times over 0.3 s"
        )

    def stop(self) -> int:
        """End it as an administrator does; the exit code."""
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stdout is not None
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.process.stdout.close()


def complete(client: httpx.Client) -> httpx.Response:
    """Ask for a short answer."""
    return client.post("/v1/completions", json=ORDINARY)


def look(client: httpx.Client) -> httpx.Response:
    """Ask whether the server is ready, which takes no work but that of the event loop."""
    return client.get("/ready")


class Bystander:
    """Somebody who asks the whole time, for answers or otherwise; `waits` is how long each took, in seconds."""

    def __init__(self, server: AttackedServer, ask: Callable[[httpx.Client], httpx.Response] = complete) -> None:
        self.waits: list[float] = []
        self.failures: list[str] = []
        self._server = server
        self._do = ask
        self._begun = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> "Bystander":
        self._thread.start()
        self._begun.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._server.url, timeout=PATIENCE, trust_env=False, verify=False) as client:
            while not self._done.is_set():
                self._begun.set()
                start = time.monotonic()
                try:
                    answer = self._do(client)
                    if answer.status_code != 200:
                        self.failures.append(answer.text)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    return
                self.waits.append(time.monotonic() - start)
                time.sleep(0.02)
