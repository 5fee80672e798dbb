"""Several training processes, here and on other machines: one command, each with its rank as torchrun sets it."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.settings import Process, environment_of, process, restarts
from adapterhub_local.signals import handling

PATIENCE = timedelta(minutes=30)  # how long processes wait for each other: one may write a checkpoint meanwhile


@dataclass(frozen=True)
class Nodes:
    """The machines that train together: how many, which of them this is (from 0), and where the first one listens."""

    count: int = 1
    rank: int = 0
    host: str = "127.0.0.1"
    port: int | None = None  # None: one that is free, which only this machine knows


def read_nodes(count: int, rank: int | None, rendezvous: str | None) -> Nodes:
    """The machines as the options of `qhub train` say. Raises InputError with what is missing or makes no sense."""
    if count == 1:
        if rank is not None or rendezvous is not None:
            raise InputError("--node-rank and --rendezvous are for several machines: say with --nnodes how many")
        return Nodes()
    if rank is None or rendezvous is None:
        raise InputError(
            f"--nnodes {count} needs --node-rank (0 to {count - 1}, different on each machine) and "
            "--rendezvous HOST:PORT (of machine 0, the same on each)"
        )
    if not 0 <= rank < count:
        raise InputError(f"--node-rank {rank}: with --nnodes {count} it is from 0 to {count - 1}")
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"--rendezvous {rendezvous}: write HOST:PORT, such as 10.0.0.1:29500")
    return Nodes(count, rank, host.strip("[]"), int(port))


def launch(arguments: Sequence[str], num_processes: int, nodes: Nodes = Nodes(), *, is_quiet: bool = False) -> int:
    """Run `qhub ARGUMENTS` in `num_processes` processes here; returns the exit code of the first that failed, or 0.

    The first process here speaks for all, on standard error alone if `is_quiet`. Ctrl-C and SIGTERM are handed on, so
    that every process saves and stops after the same step. When one fails, the others, which would wait for it, are
    stopped.
    """
    port = nodes.port or _free_port()
    command = [sys.executable, "-m", "adapterhub_local", *arguments]
    children = [
        subprocess.Popen(
            command,
            env=environment_of(
                Process(nodes.rank * num_processes + local, local, nodes.count * num_processes),
                num_processes, nodes.host, port,
            ),
            stdout=None if local == 0 and not is_quiet else subprocess.DEVNULL,
            stderr=None if local == 0 else subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C reaches them once, from here
        )
        for local in range(num_processes)
    ]  # fmt: skip

    def hand_on(number: int, frame: Any) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    try:
        with handling((signal.SIGINT, signal.SIGTERM), hand_on, ignored_too=True):
            return _wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()


def join(device: str) -> None:
    """Meet the other training processes, on `cpu` or `cuda`; nothing where there are none, or they have met.

    What the processes find each other by is kept apart for each time that torchrun starts them: torch 2.13 keeps one
    store for all times, in which some would find those that are gone, and wait for them.
    """
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if process().world_size == 1 or distributed.is_initialized():
        return
    store, rank, world_size = next(iter(rendezvous("env://")))
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=PrefixStore(f"start {restarts() or 0}", store),
        rank=rank,
        world_size=world_size,
        timeout=PATIENCE,
    )


@contextmanager
def missing_others() -> Iterator[None]:
    """Raise QhubError where another process is gone that this one waits for: torch's error is pages long."""
    try:
        yield
    except RuntimeError as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        if "DistError" not in kinds and "/gloo/" not in str(error):
            raise
        raise QhubError(
            "another process of this run is gone, so it cannot go on: see what that one reports, and continue with "
            f"--resume ({str(error).splitlines()[0][:200]})"
        ) from None


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
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
