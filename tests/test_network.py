"""Nothing is called from elsewhere unless it is asked for: commands in a process that sees every attempt."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GUARDED = """
import ipaddress, socket, sys
attempts = []
def is_near(host):
    try:
        return host in (None, "", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
def connect(self, address, real=socket.socket.connect):
    if self.family != socket.AF_UNIX and not is_near(address[0]):
        attempts.append(address)
        raise OSError("no network here")
    return real(self, address)
def getaddrinfo(host, *arguments, real=socket.getaddrinfo, **options):
    if not is_near(host if isinstance(host, str | None) else host.decode()):
        attempts.append(host)
        raise socket.gaierror("no network here")
    return real(host, *arguments, **options)
socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
from adapterhub_local.cli.main import run
code = 0
try:
    run(sys.argv[1:])
except SystemExit as stopped:
    code = stopped.code or 0
print("attempts", attempts, "code", code, file=sys.stderr)
"""


def guarded(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """`qhub` in a process of its own that may use the network, as far as its environment says."""
    unset = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    root = str(Path(__file__).parents[1])
    return subprocess.run([sys.executable, "-c", GUARDED, *arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env={**environment, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"})  # fmt: skip


def test_the_guard_sees_what_is_tried(tmp_path: Path) -> None:
    """A pull does ask the network, which this way of looking notices."""
    done = guarded("pull", "org/name", cwd=tmp_path)
    assert "attempts ['huggingface.co'] code 1" in done.stderr, done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("list",), ("show", "none")], ids=" ".join)
def test_light_verbs_call_nobody(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Help and the registry's verbs ask nothing of the network."""
    assert "attempts []" in guarded(*arguments, cwd=tmp_path).stderr
