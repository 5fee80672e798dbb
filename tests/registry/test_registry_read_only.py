"""A home that cannot be written is of use to all verbs that only read: merge, export, push, diff, verify and serve."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home, cache
from tests.hub_server import HubServer
from tests.patience import PATIENCE
from tests.processes import hold_to_modes
from tests.serve.adapter_makers import publish

WORK = """
import os, sys
from pathlib import Path
from click.testing import CliRunner
from adapterhub_local.base.bases import find_base
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.main import qhub
from adapterhub_local.registry import Registry
from tests.serve.conftest import Server

home, out = Path(os.environ["QHUB_HOME"]), Path(sys.argv[1])
try:
    (home / "probe").touch()
    sys.exit("this home can be written: the test shows nothing")
except PermissionError:
    pass
for line in (
    f"export alpha --to file -o {out}/alpha.safetensors",
    f"export alpha --to gguf -o {out}/alpha.gguf",
    f"export alpha --oci {out}/alpha.tar",
    f"merge alpha beta --weights 1,1 -o {out}/sum",
    "diff alpha beta",
    "verify alpha",
    "push beta me/beta",
    "path beta",
):
    done = CliRunner().invoke(qhub, line.split())
    assert done.exit_code == 0, (line, done.output, done.exception)
server = Server(load_base(find_base("tiny", Registry().home), device="cpu"), Registry())
for model in ("alpha", "alpha*0.5+beta"):
    answer = server.complete(model=model, prompt="Hello")
    assert answer.status_code == 200, answer.text
server.stop()
"""


@pytest.fixture
def read_only(home: Home, tiny_base: BaseInfo) -> Iterator[Home]:
    """A home with two versions whose folders nobody has asked for yet, and which nobody may write."""
    registry = Registry(home)
    publish(registry, "alpha", tiny_base, seed=1)
    publish(registry, "beta", tiny_base, seed=2)
    registry.database.close()
    assert not home.folders.exists()
    folders = [home.root, *(path for path in home.root.rglob("*") if path.is_dir())]
    home.database.chmod(0o444)
    for folder in folders:
        folder.chmod(0o555)
    yield home
    for folder in folders:
        folder.chmod(0o755)


def test_verbs_that_read_need_no_right_to_write(read_only: Home, hub: HubServer, tmp_path: Path) -> None:
    """Every one of them does its work as ever, from a home it never wrote to; nothing in it changes."""
    before = sorted(path for path in read_only.root.rglob("*"))
    caches = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf"), "QHUB_DEVICE": "cpu"}
    (tmp_path / "cache" / cache().name).mkdir(parents=True)
    for kernels in cache().glob("kernels-*.so"):  # which take longer to compile than all that is tested here
        shutil.copy2(kernels, tmp_path / "cache" / cache().name)
    there = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token}
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(tmp_path)], env={**os.environ, **caches, **there},
        capture_output=True, text=True, timeout=PATIENCE, check=False, preexec_fn=hold_to_modes,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"alpha.safetensors", "alpha.gguf", "alpha.tar", "sum"} <= {path.name for path in tmp_path.iterdir()}
    assert list(hub.repos) == ["me/beta"]
    assert sorted(path for path in read_only.root.rglob("*")) == before
