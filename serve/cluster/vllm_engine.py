"""VllmEngine: a vLLM of its own in a replica, in another environment, which only this process reaches.

It listens on a socket in a folder that only this user may enter, and ends with this process, however that ends.
"""

import asyncio
import ctypes
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

from adapterhub_local import settings
from adapterhub_local.base.bases import choose_base
from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.registry import Registry
from serve.cluster.config import ClusterConfig
from serve.cluster.following import follow, shortly
from serve.cluster.vllm_app import Adapters, create_vllm_app

HOST = "http://vllm"  # not an address: the socket is
LOOK = 0.5  # seconds between looks at whether it has started
ANSWER_SECONDS = 10.0  # in which it must say that it is well
END_SECONDS = 20.0
IDLE_SECONDS = 2.0  # shorter than vLLM keeps a connection that nobody uses
PR_SET_PDEATHSIG = 1  # of prctl(2)


class VllmEngine:
    """See ReplicaEngine."""

    app: ASGIApp

    def __init__(self, replica: str, config: ClusterConfig) -> None:
        self._replica = replica
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None

    async def start(self) -> None:
        """See ReplicaEngine. Raises InputError if vLLM cannot be run, QhubError if it does not start."""
        home, wanted = settings.home(), self._config.vllm
        info = choose_base(self._config.base, home, "the cluster")
        registry = Registry(home)
        self._follower = await asyncio.to_thread(follow, self._config, registry, info)
        if self._follower is not None:
            self._follower.start()
        self._folder = tempfile.mkdtemp(prefix="qhub-")  # mode 0700; a socket's path must be short
        socket = str(Path(self._folder) / "vllm")
        assert wanted.model is not None, "without a model there is no vLLM"
        command = [*wanted.command, wanted.model, "--served-model-name", info.name, "--uds", socket, "--enable-lora"]
        try:
            self._process = subprocess.Popen(
                [*command, *wanted.options], stdin=subprocess.DEVNULL, preexec_fn=_ending_with_us(),
                env=settings.environment_of_vllm(home, info.name),
            )  # fmt: skip
        except OSError as error:
            raise InputError(f"vllm.command: {wanted.command[0]} cannot be run: {error.strerror or error}") from None
        # it must answer at once while nothing is asked, but an answer may take as long as the gateway waits
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=socket, limits=httpx.Limits(keepalive_expiry=IDLE_SECONDS)),
            base_url=HOST,
            timeout=httpx.Timeout(None, connect=ANSWER_SECONDS),
            trust_env=False,
        )
        try:
            await self._wait_for(self._process, wanted.start)
            (served, *_) = (await self._client.get("/v1/models")).json()["data"]
        except BaseException:
            await self.stop()
            raise
        self._adapters = Adapters(registry, info, self._config.followed, served["max_model_len"])
        self.app = create_vllm_app(self._client, self._adapters, self._replica)

    async def _wait_for(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        """Return when it answers. Raises QhubError if it does not within `seconds`."""
        deadline = time.monotonic() + seconds
        while not await self.is_alive():
            if process.poll() is not None:
                raise QhubError(f"vLLM ended with exit code {process.returncode} before it had started: see its log")
            if time.monotonic() > deadline:
                raise QhubError(f"vLLM had not started after {seconds:g} s: see its log, or raise vllm.start")
            await asyncio.sleep(LOOK)

    async def stop(self) -> None:
        """See ReplicaEngine."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        if self._follower is not None:
            await asyncio.to_thread(self._follower.stop)
        await self._client.aclose()
        shutil.rmtree(str(self._folder), ignore_errors=True)
        self._process = None

    async def is_alive(self) -> bool:
        """See ReplicaEngine. vLLM says so of its engine's process, too."""
        if self._process is None or self._process.poll() is not None:
            return False
        try:
            return (await self._client.get("/health", timeout=ANSWER_SECONDS)).status_code == 200
        except httpx.HTTPError:
            return False

    def facts(self) -> Mapping[str, Any]:
        """See ReplicaEngine. How many bytes vLLM keeps of them it does not say."""
        return {"engine": "vllm", "adapters": self._adapters.names, "adapter_bytes": 0, **shortly(self._follower)}


def _ending_with_us() -> Callable[[], None]:
    """What has the kernel end a process that is about to run another program, when the one that started it ends."""
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM) if hasattr(libc, "prctl") else None
