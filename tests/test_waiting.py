"""How long threads wait awake: set by the server before torch is loaded, and left to whoever has chosen it."""

import subprocess
import sys
from pathlib import Path

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
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
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


def test_the_server_sets_it_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`qhub serve` does, other commands do not."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("QHUB_HOME", str(tmp_path))
    script = """
import os, sys
class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("torch", os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()  # what comes after is of no interest here
sys.meta_path.insert(0, Watch)
from adapterhub_local.cli.main import run
try:
    run(["list"])
except SystemExit:
    print("list", os.environ.get("GOMP_SPINCOUNT"))
run(["serve", "--base", "missing"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert [line for line in done.stdout.splitlines() if line.startswith(("list ", "torch "))] == [
        "list None",
        "torch 1000",
    ]
