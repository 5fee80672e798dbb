"""Several training processes on this machine: the same command once a process, each told its rank as torchrun does."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from adapterhub_local.settings import environment_of


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run `qhub ARGUMENTS` in `num_processes` processes; returns the exit code of the first that failed, or 0.

    Rank 0 speaks for all. Ctrl-C and SIGTERM are handed on, so that every process saves and stops after the
    same step. When one fails, the others, which would wait for it, are stopped.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "adapterhub_local", *arguments]
    children = [
        subprocess.Popen(
            command,
            env=environment_of(rank, num_processes, port),
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C reaches them once, from here
        )
        for rank in range(num_processes)
    ]

    def hand_on(number: int, frame: Any) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(children)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()


def _wait(children: Sequence[subprocess.Popen]) -> int:
    while True:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if failed:
            deadline = time.monotonic() + 10  # the others mostly fail of the same
            while time.monotonic() < deadline and any(child.poll() is None for child in children):
                time.sleep(0.05)
            first = children[0].poll()
            return abs(first if first else failed[0])
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
