"""What is released: the same bytes from two builds, a wheel that runs alone, a container's and a service's files."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from adapterhub_local.doctor import EXTRAS, STATES, examine
from adapterhub_local.registry import Registry
from adapterhub_local.registry.config import Hook
from adapterhub_local.registry.config_edit import add_hook
from adapterhub_local.registry.hooks.state import State, Waiting, write_state
from adapterhub_local.settings import Home, environment_in
from tests.stores import LINEAGE, files

ROOT = Path(__file__).parents[1]
QHUB = [sys.executable, "-m", "adapterhub_local"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist and the wheel, built twice, from copies of the sources with other times, in another zone and umask."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("the sources are not in git here")
    out = tmp_path_factory.mktemp("dist")
    for name, zone, umask in (("one", "UTC", 0o022), ("two", "Asia/Tokyo", 0o077)):
        done = subprocess.run(
            [sys.executable, ROOT / "release" / "dist.py", out / name, "--no-isolation"], umask=umask,
            env={**os.environ, "SOURCE_DATE_EPOCH": "1790000000", "TZ": zone},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return out


def test_two_builds_give_the_same_bytes(dist: Path) -> None:
    """Whatever the time, the zone and the umask: the sdist and the wheel are equal byte for byte."""
    names = [sorted(path.name for path in (dist / folder).iterdir()) for folder in ("one", "two")]
    assert names[0] == names[1]
    assert [name.partition("-")[2] for name in names[0]] == ["0.3.0-py3-none-any.whl", "0.3.0.tar.gz"]
    for name in names[0]:
        assert (dist / "one" / name).read_bytes() == (dist / "two" / name).read_bytes(), name


def test_the_wheel_runs_in_an_environment_of_its_own(dist: Path, tmp_path: Path) -> None:
    """Installed beside what it needs, from no folder of ours: help, doctor and a recipe that checks."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (wheel,) = (dist / "one").glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    # what it depends on is here already; .pth files in there, such as our own editable one, are not followed
    (site / "needed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "QHUB_HOME": str(tmp_path / "home")
    }

    def said(*words: str) -> str:
        command = [tmp_path / "venv" / "bin" / "qhub", *words]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import adapterhub_local, serve; print(adapterhub_local.__file__, serve.__file__)"
    found = subprocess.run([python, "-c", where], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(Path(path).is_relative_to(site) for path in found.stdout.split())
    assert "Have the shell complete" in said("--help")
    assert said("--version").split()[-1] == "0.3.0"
    said("recipe", "init", "mine.toml")
    assert (tmp_path / "mine.toml").is_file()
    assert {one["state"] for one in json.loads(said("doctor", "--json"))} <= set(STATES)


def test_the_container_copies_what_is_there_and_asks_a_route_that_is_served() -> None:
    """Every file that the Dockerfile copies exists, and its health check and command use what qhub has."""
    text = (ROOT / "Dockerfile").read_text()
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ") and "--from" not in line]
    assert copied
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists(), name
    assert "/tmp" not in text, "a build of an image writes where nobody else does"
    assert re.search(r"^USER qhub$", text, re.MULTILINE)
    (path,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", text)
    assert any(f'"{path}"' in file.read_text() for file in (ROOT / "serve" / "http").glob("*.py"))
    assert "--host" in subprocess.run([*QHUB, "serve", "--help"], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_finds_no_fault_with_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` says nothing about the unit, with a program that is here in the place of ours."""
    text = (ROOT / "examples" / "qhub.service").read_text()
    assert "/opt/qhub/bin/qhub serve" in text
    (tmp_path / "qhub.service").write_text(text.replace("/opt/qhub/bin/qhub serve", "/bin/true"))
    command = ["systemd-analyze", "verify", "--recursive-errors=no", "--man=no", tmp_path / "qhub.service"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "qhub" in line]) == (0, [])


def test_a_sound_home_has_nothing_broken(tmp_path: Path) -> None:
    """The doctor looks at all of it without torch, and writes nothing."""
    registry = Registry(tmp_path / "home")
    registry.publish("a", files(1), LINEAGE)
    before = sorted(path.name for path in registry.home.root.rglob("*"))
    code = (
        "import sys; from adapterhub_local.cli.main import run\n"
        "try: run(['doctor', '--json'])\n"
        "finally: assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    env = environment_in(registry.home)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["what"] for one in found if one["about"] == "registry"] == [f"1 version in {registry.home.root}"]
    assert all(one["fix"] for one in found if one["state"] in ("slow", "broken") and one["about"] != "processor")
    assert sorted(path.name for path in registry.home.root.rglob("*") if not path.name.endswith(("-wal", "-shm"))) == [
        name for name in before if not name.endswith(("-wal", "-shm"))
    ]


def test_every_extra_is_looked_for() -> None:
    """The doctor knows each extra that a user can install: all of them but those for working on qhub itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"demo", "dev", "docs"}


def test_what_is_broken_is_named_with_its_fix(tmp_path: Path) -> None:
    """A damaged database, a config that cannot be read, a hook that gave up and a base without weights: exit code 1."""
    registry = Registry(tmp_path / "home")
    registry.publish("a", files(1), LINEAGE)
    add_hook(registry, Hook("ci", url="http://127.0.0.1:9/"))
    write_state(registry.home, "ci", State(9, {}, {1: Waiting(8, 0.0, "HTTP 500")}))
    assert _broken(registry.home) == {"hook ci": "qhub hook deliver ci --failed"}
    registry.home.config.write_text("x")
    assert "config.toml is not TOML" in {one.about: one.what for one in examine(registry.home)}["config"]
    registry.home.config.unlink()
    registry.database.close()
    for path in registry.home.root.glob("registry.db*"):
        path.unlink()
    assert _broken(registry.home) == {"registry": "qhub fsck --repair"}
    done = subprocess.run(
        [*QHUB, "doctor"], env=environment_in(registry.home), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "qhub: registry is broken\n")


def _broken(home: Home) -> dict[str, str | None]:
    return {one.about: one.fix for one in examine(home) if one.state == "broken"}


@pytest.mark.parametrize(
    ("shell", "path"),
    [("bash", "data/bash-completion/completions/qhub"), ("zsh", "data/zsh/site-functions/_qhub"),
     ("fish", "config/fish/completions/qhub.fish")],
)  # fmt: skip
def test_completion_is_installed_where_the_shell_looks(shell: str, path: str, tmp_path: Path) -> None:
    """What is installed is what is printed, and nothing half-written lies beside it."""
    env = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "data"), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    printed = subprocess.run([*QHUB, "completion", shell], env=env, capture_output=True, text=True, check=True).stdout
    subprocess.run([*QHUB, "completion", shell, "--install"], env=env, capture_output=True, check=True)
    assert (tmp_path / path).read_text() == printed.removesuffix("\n")
    assert [one.name for one in (tmp_path / path).parent.iterdir()] == [Path(path).name]
    assert "_QHUB_COMPLETE" in printed


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
def test_bash_completes_verbs_and_options(tmp_path: Path) -> None:
    """A real bash with the script gives the verbs that begin so, and the options of a verb."""
    program = tmp_path / "qhub"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m adapterhub_local "$@"\n')
    program.chmod(0o755)
    script = subprocess.run([*QHUB, "completion", "bash"], capture_output=True, text=True, check=True).stdout
    (tmp_path / "script").write_text(script)
    for words, expected in ((("qhub", "hist"), ["history"]), (("qhub", "gc", "--keep-"), ["--keep-aliased"])):
        line = (
            f"source {tmp_path}/script; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1};"
            f' _qhub_completion {program}; echo "${{COMPREPLY[@]}}"'
        )
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
        assert done.stdout.split() == expected
