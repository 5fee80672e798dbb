"""How long threads wait awake: set by the commands before torch is loaded, and left to whoever has chosen it."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from adapterhub_local.settings import wait_briefly
wait_briefly()
assert "torch" not in sys.modules
import torch
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["nothing", "a count", "a policy"],
)
def test_how_threads_wait(chosen: dict[str, str], kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says counts."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == kept


def test_the_command_sets_it_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`qhub` itself does, and so do the processes it starts."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    script = """
import os, sys
from adapterhub_local.cli.main import run
try:
    run(["completion", "--help"])
except SystemExit:
    print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.split()[-2:] == ["10000", "False"]
