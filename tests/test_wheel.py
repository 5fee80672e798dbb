"""The wheel: both packages and the command, and nothing else; installed alone, its console has all that it needs."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import httpx
import pytest

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools writes build/ and *.egg-info beside the project."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("the wheel cannot be built without setuptools: pip install setuptools")
    tmp_path = tmp_path_factory.mktemp("wheel")
    skipped = ignore_patterns(".*", "tests", "recipes", "benchmarks", "build", "dist", "*.egg-info", "__pycache__")
    copytree(ROOT, tmp_path / "project", ignore=skipped)
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--wheel-dir", str(tmp_path), str(tmp_path / "project")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("adapterhub_local-*.whl")
    return built


def test_the_wheel_holds_both_packages_and_the_command(wheel: Path) -> None:
    """A wheel built from the project has every module of adapterhub_local and serve, `qhub`, and no test or recipe."""
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


def test_the_console_of_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Installed in an empty environment, `qhub console` answers with its page, and with every style and script."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    install = [*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, timeout=PATIENCE)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["QHUB_HOME"] = str(tmp_path / "home")
    where = [str(python), "-c", "import adapterhub_local, serve; print(adapterhub_local.__file__, serve.__file__)"]
    found = subprocess.run(where, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert all(Path(one).is_relative_to(packages) for one in found.stdout.split())
    command = [str(python.with_name("qhub")), "console", "--port", "0"]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            page = httpx.get(url, timeout=PATIENCE, trust_env=False)
            assert page.status_code == 200
            assert "No adapters yet" in page.text
            files = [path.name for path in (ROOT / "serve" / "console" / "static").iterdir()]
            assert re.search(r'href="/console/static/console\.css\?v=', page.text)
            for name in files:
                answer = httpx.get(f"{url}/static/{name}", timeout=PATIENCE, trust_env=False)
                assert answer.content == (ROOT / "serve" / "console" / "static" / name).read_bytes()
                assert answer.headers["content-type"].startswith(
                    "text/css" if name.endswith("css") else "text/javascript"
                )
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
