"""SIGTERM to a process whose main thread is busy and has a handler of its own, as those of Ray have."""

import subprocess
import sys

from tests.patience import PATIENCE

CODE = """
import asyncio, os, signal, sys, threading, time
from serve.cluster.ending import at_sigterm

signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
told = []

async def actor():
    at_sigterm(lambda: told.append(1))
    for count in (1, 2):
        os.kill(os.getpid(), signal.SIGTERM)
        while len(told) < count:
            await asyncio.sleep(0.01)

thread = threading.Thread(target=lambda: asyncio.run(actor()))
thread.start()
while thread.is_alive():
    time.sleep(0.01)
print(len(told))
"""


def test_sigterm_is_told_and_does_not_end() -> None:
    """Code in another thread learns of each SIGTERM, and the handler that would end the process does not run."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
