"""The wheel: both packages and the command, and nothing else."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed here")
def test_the_wheel_holds_both_packages_and_the_command(tmp_path: Path) -> None:
    """A wheel built from the project has every module of adapterhub_local and serve, `qhub`, and no test or recipe."""
    # built from a copy: setuptools writes build/ and *.egg-info beside the project
    skipped = ignore_patterns(".*", "tests", "recipes", "benchmarks", "build", "dist", "*.egg-info", "__pycache__")
    copytree(ROOT, tmp_path / "project", ignore=skipped)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(tmp_path), str(tmp_path / "project")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("adapterhub_local-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "qhub = adapterhub_local.cli.main:run" in archive.read(entry_points).decode()
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("adapterhub_local", "serve")
        for path in (ROOT / package).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    pages = {
        path.relative_to(ROOT).as_posix()
        for folder in ("templates", "static")
        for path in (ROOT / "serve" / "console" / folder).iterdir()
    }
    assert len(pages) > 10
    assert pages <= names
    assert {"adapterhub_local/py.typed", "serve/py.typed"} <= names  # a user's type checker reads our annotations
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"adapterhub_local", "serve"}
