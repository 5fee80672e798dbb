"""SIGTERM to a process whose main thread is busy and has a handler of its own, as those of Ray have."""

import subprocess
import sys

from tests.patience import PATIENCE

CODE = """
import asyncio, os, signal, sys, threading, time
from serve.cluster.ending import at_sigterm

signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
ended = []

async def actor():
    at_sigterm(lambda: ended.append(1))
    os.kill(os.getpid(), signal.SIGTERM)
    while not ended:
        await asyncio.sleep(0.01)
    for _ in range(1000):  # far more than the pipe holds
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0)

thread = threading.Thread(target=lambda: asyncio.run(actor()))
thread.start()
while thread.is_alive():
    time.sleep(0.01)
print(len(ended))
"""


def test_sigterm_ends_once_and_no_process() -> None:
    """Code in another thread learns of SIGTERM once, and the handler that would end the process does not run."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
