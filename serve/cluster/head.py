"""Ray itself: a cluster of Ray that runs already, or one of our own on this machine, which ends with `down`."""

import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapterhub_local import settings
from adapterhub_local.durable import replacing
from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.settings import Home, make_folder
from serve.listen import listen

HOW = (
    "Ray is not installed, which `qhub cluster` and `qhub train --ray` need: pip install 'adapterhub-local[ray]', in "
    "the environment of qhub, on every machine of the cluster"
)
STORE_BYTES = 80_000_000  # Ray's object store, which nothing of ours uses
START_SECONDS = 120.0
END_SECONDS = 5.0


def check_ray() -> None:
    """Raises InputError if Ray is not installed."""
    from importlib.util import find_spec

    # nothing that imports Ray, which reads the environment then
    if find_spec("ray") is None or find_spec("grpc") is None:
        raise InputError(HOW)


def folder(home: Home) -> Path:
    """Where what is known of the home's cluster is kept."""
    return home.root / "cluster"


def read_head(home: Home) -> dict[str, Any] | None:
    """The Ray that `start_head` started for this home, if it still runs."""
    try:
        found: dict[str, Any] = json.loads((folder(home) / "head.json").read_text())
        return found if _is_ours(found["pid"], found["begun"]) else None
    except (OSError, ValueError, KeyError):
        return None


def start_head(home: Home) -> dict[str, Any]:
    """Start Ray on this machine, reached from this machine alone, by whoever knows the token. Raises QhubError."""
    place = folder(home)
    make_folder(place)
    token = place / "token"
    if not token.exists():
        with replacing(token, 0o600) as staged:
            staged.write_text(secrets.token_hex(32))
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    script = Path(sys.executable).with_name("ray")
    command = [
        str(script) if script.exists() else (shutil.which("ray") or "ray"),
        *("start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=false"),
        *("--node-ip-address=127.0.0.1", f"--port={port}", f"--object-store-memory={STORE_BYTES}"),
    ]
    log = place / "ray.log"
    environment = settings.environment_in(home) | settings.ray_environment(token)
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    address = f"127.0.0.1:{port}"
    deadline = time.monotonic() + START_SECONDS
    while b"Ray runtime started" not in log.read_bytes():
        if child.poll() is not None or time.monotonic() > deadline:
            _end(child.pid)
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise QhubError(
                f"Ray did not start ({lines[-1].strip() if lines else 'it printed nothing'}); {log} has more"
            )
        time.sleep(0.1)
    found = {"pid": child.pid, "begun": _begun(child.pid), "address": address}
    with replacing(place / "head.json", 0o600) as staged:
        staged.write_text(json.dumps(found))
    return found


def stop_head(home: Home) -> bool:
    """End the Ray that was started for this home, and all it runs; whether there was one."""
    found = read_head(home)
    if found is not None:
        _end(found["pid"])
    (folder(home) / "head.json").unlink(missing_ok=True)
    return found is not None


def connect(home: Home) -> bool:
    """Connect this process to Ray: at RAY_ADDRESS, else to this home's own; False if there is none of these.

    Raises InputError if a Ray that others can reach asks for no token.
    """
    address, own = settings.ray_address(), read_head(home)
    if address is None and own is None:
        return False
    if address is None:
        assert own is not None
        address = own["address"]
        settings.use_ray_token(folder(home) / "token")
    elif not settings.has_ray_token() and not _is_local(address):
        raise InputError(
            f"the Ray at {address} can be reached by others, and RAY_AUTH_MODE is not 'token': whoever reaches it may "
            "run anything there. Start it with RAY_AUTH_MODE=token, and set the same here"
        )
    import ray
    import ray.serve  # it sets up its own log

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        ray.init(
            address=address, namespace="serve", log_to_driver=False, configure_logging=False, logging_level="ERROR"
        )
    except Exception as error:  # Ray has many
        raise QhubError(f"there is no answer from Ray at {address}: {str(error).strip().splitlines()[0]}") from None
    return True


def _is_local(address: str) -> bool:
    return address.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]") or address in ("auto", "local")


def _begun(pid: int) -> str | None:
    """When a process began, in the kernel's ticks, which distinguishes it from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_ours(pid: int, begun: str | None) -> bool:
    return begun is not None and _begun(pid) == begun


def _end(pid: int) -> None:
    """End a process group, first by asking."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGTERM)
    deadline = time.monotonic() + END_SECONDS
    while _lives(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _lives(pid: int) -> bool:
    with suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return False
    return _begun(pid) is not None
