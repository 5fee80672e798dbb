"""End to end on the real demo base: the demo runs as a user runs it, and makes nothing twice.

python -m pytest tests/demo        # about 5 minutes on 2 cores, most of it this file
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.demo_base, pytest.mark.timeout(900)]


def run_demo(home: Home) -> str:
    """The demo, on a small part of the data, in its own home."""
    command = [sys.executable, "examples/demo.py", "--examples", "32", "--tests", "8"]
    environment = {**os.environ, "QHUB_HOME": str(home.root)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def output(demo_home: Home) -> str:
    """What the demo printed in a home of its own."""
    return run_demo(demo_home)


def test_the_demo(demo_home: Home, output: str) -> None:
    """The demo trains, merges, scores and answers; run again it makes nothing twice."""
    again = run_demo(demo_home)

    for name in ("smollm2", "sentiment", "origin", "both"):
        assert name in output.rpartition("$ qhub serve --base")[2]
    assert output.count("$ qhub train") == 2
    assert "$ qhub train" not in again
    assert "$ qhub eval" not in again
    assert [str(version) for version in Registry(demo_home).versions()] == ["both@1", "origin@1", "sentiment@1"]


def test_training_was_worth_it(demo_home: Home, output: str) -> None:
    """Even two steps on real text lower the loss on texts that were not seen."""
    scores = Registry(demo_home).resolve("sentiment").lineage["metrics"]["sentiment"]

    assert scores["adapter"]["loss"] < scores["base"]["loss"]
