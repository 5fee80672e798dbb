"""The runs of a sweep as tasks of Ray: trained in another home, at once, they come by a remote (`make check-ray`)."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.cli.main import run
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.registry.remotes import add_remote
from adapterhub_local.settings import Home
from adapterhub_local.settings import home as home_at
from adapterhub_local.train.train import train
from tests.chats import RECIPE, write_recipe

SWEEP = RECIPE + "[sweep.grid]\ntrain.seed = [1, 2]\n"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--remote", "team"], "--remote is for --ray"),
        (["--ray"], "--ray trains the runs of a sweep"),
        (["--ray", "--only-run", "1"], "--ray trains the runs of a sweep"),
        (["--ray", "--nproc", "2"], "--ray trains each run in one process"),
        (["--ray", "--dry-run"], "--ray trains each run in one process"),
        (["--ray", "--remote", "nowhere"], "there is no remote 'nowhere'"),
    ],
)
def test_options_that_make_no_sense(
    tiny_base: BaseInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    """Ray for what it does not do, and a remote that is not there, are refused in one line."""
    is_one = reason.startswith("--ray trains the runs") and "--only-run" not in options
    path = write_recipe(tmp_path, RECIPE if is_one else SWEEP)
    with pytest.raises(SystemExit) as exit_info:
        run(["train", str(path), *options])

    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert reason in error
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def ray_home(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """The home of the only machine of a Ray of our own."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: `make check-ray` runs this in an environment of its own")
    from serve.cluster.head import start_head, stop_head

    place = home_at(tmp_path_factory.mktemp("ray") / "machine")
    shutil.copytree(built_base, place.bases / "tiny")
    start_head(place)
    try:
        yield place
    finally:
        stop_head(place)


def qhub(place: Home, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`qhub ...` in a process of its own, in the home `place`."""
    environment = {**os.environ, "QHUB_HOME": str(place.root)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "adapterhub_local", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_on_another_machine(ray_home: Home, tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """Both runs are trained in the machine's home and come by the remote: the very adapters that are trained here.
    Without a remote the home that has them is named, and a machine without the base with what it lacks."""
    path = write_recipe(tmp_path, SWEEP)
    wanted = {}
    for seed in (1, 2):
        plain = write_recipe(tmp_path).rename(tmp_path / f"plain{seed}.toml")
        wanted[train(load_recipe(plain, [f"train.seed={seed}", "output.name=plain"]), home).content_digest] = seed
    write_recipe(tmp_path, SWEEP)
    add_remote(home, "team", str(tmp_path / "remote"))
    shutil.copytree(ray_home.root / "cluster", home.root / "cluster")  # this home's Ray, too
    done = qhub(home, "train", str(path), "--ray", "--remote", "team")

    assert done.returncode == 0, done.stderr
    registry, there = Registry(home), Registry(ray_home)
    versions = registry.versions("yes-no")
    assert {version.content_digest for version in versions} == set(wanted)
    assert {version.content_digest for version in there.versions("yes-no")} == set(wanted)
    assert registry.resolve("yes-no@best").number in {1, 2}
    assert "is the best by loss: yes-no@best" in done.stdout

    elsewhere = qhub(home, "train", str(path), "--ray", "--set", "train.epochs=1")
    assert (elsewhere.returncode, "Traceback" in elsewhere.stderr) == (2, False), elsewhere.stderr
    assert "which is not this one: name a remote that both reach, with --remote" in elsewhere.stderr
    shutil.rmtree(ray_home.bases / "tiny")
    without = qhub(home, "train", str(path), "--ray", "--remote", "team", "--set", "train.epochs=3")
    assert (without.returncode, "Traceback" in without.stderr) == (2, False), without.stderr
    assert f"on {socket.gethostname()}: " in without.stderr
    assert "base" in without.stderr
