"""The command line as a program: encodings, pipes, exit codes of the process."""

import os
import subprocess
import sys
from pathlib import Path

from adapterhub_local.lora.config import WEIGHTS
from adapterhub_local.registry import Registry
from tests.patience import PATIENCE


def test_letters_that_cannot_be_shown_are_no_error(tmp_path: Path) -> None:
    """A file name that is not UTF-8, and a terminal without the letters of a description, are shown escaped."""
    lineage = {"kind": "train", "description": "größer 日本", "parents": [{"reference": "\udcff.st", "weight": 1.0}]}
    registry = Registry()
    made = registry.publish("a", {WEIGHTS: b"x"}, lineage)
    assert registry.resolve("a").lineage == lineage
    assert registry.resolve("a").manifest_digest == made.manifest_digest
    for encoding, shown in (("ascii", "gr\\xf6\\xdfer"), ("utf-8", "größer 日本")):
        for line in ("show a", "show a --json", "list"):
            program = [sys.executable, "-m", "adapterhub_local", *line.split()]
            environment = {**os.environ, "PYTHONIOENCODING": encoding}
            done = subprocess.run(program, capture_output=True, env=environment, timeout=PATIENCE, check=False)
            assert done.returncode == 0, done.stderr
            assert line != "show a" or shown in done.stdout.decode()


def test_a_reader_that_goes_away_is_no_error_message() -> None:
    """`qhub list | head -1` ends without a traceback, also when the pipe is closed before the table is written."""
    registry = Registry()
    for number in range(30):
        registry.publish(f"adapter-{number}", {WEIGHTS: b"x"}, {"kind": "test", "base": {"name": "x" * 200}})
    program = [sys.executable, "-m", "adapterhub_local", "list"]
    lister = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert lister.stdout is not None
    lister.stdout.close()
    _, err = lister.communicate(timeout=PATIENCE)
    assert err == b""
    piped = subprocess.run(
        f'"{sys.executable}" -m adapterhub_local list | head -1',
        shell=True,
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )
    assert piped.stderr == b""


def test_the_module_is_the_command(tmp_path: Path) -> None:
    """`python -m adapterhub_local` and the installed `qhub` are the same program, with the same exit codes."""
    installed = Path(sys.executable).parent / "qhub"
    programs = [[sys.executable, "-m", "adapterhub_local"]] + ([[str(installed)]] if installed.exists() else [])
    for program in programs:
        done = subprocess.run(
            [*program, "show", "none"], capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path, check=False
        )
        assert done.returncode == 2
        assert done.stderr == "qhub: there is no adapter 'none': `qhub list` shows what there is\n"


def test_a_home_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    """A home on a path where nothing can be created is bad input with the reason, not a traceback."""
    code = (
        "from adapterhub_local.registry import Registry\n"
        "from adapterhub_local.errors import InputError\n"
        "try: Registry('/proc/none').publish('a', {'f': b'x'}, {})\n"
        "except InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert "Set QHUB_HOME to a writable folder" in done.stdout


def test_a_closed_output_is_no_traceback() -> None:
    """`qhub list >&-`, as some schedulers start programs, does its work in silence."""
    Registry().publish("a", {WEIGHTS: b"x"}, {"kind": "test"})
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        for line in ("list", "show a --json"):
            command = f'"{sys.executable}" -m adapterhub_local {line} {closed}'
            done = subprocess.run(command, shell=True, capture_output=True, timeout=PATIENCE, check=True)
            assert b"Traceback" not in done.stderr


def test_ctrl_c_in_the_middle_of_an_import() -> None:
    """An import that is cut short raises errors of its own; the user has stopped the command, and that is reported."""
    code = (
        "import click, os, signal\n"
        "from adapterhub_local.cli import main\n"
        "@main.qhub.command('list')\n"
        "def cut():\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt: raise ImportError('cannot load module more than once per process')\n"
        "main.Verbs.get_command = lambda *_: cut\n"
        "main.run(['list'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (130, "qhub: stopped\n")
