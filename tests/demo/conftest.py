"""The real demo base (SmolLM2-135M), quantised once for the tests of a file that ask for it."""

from pathlib import Path

import pytest

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.settings import Home
from adapterhub_local.settings import home as home_at
from examples.demo import BASE, HUB_ID, demo_base


@pytest.fixture(scope="module")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home for the tests of one file."""
    return home_at(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def demo_file() -> Path:
    """The GGUF file of the demo base."""
    return demo_base()


@pytest.fixture(scope="module")
def smollm2(demo_home: Home, demo_file: Path) -> BaseInfo:
    """The demo base in that home."""
    return add_base(BASE, demo_file, demo_home, hub_id=HUB_ID)
