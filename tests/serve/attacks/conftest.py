"""One server process for all attacks, with a base whose chat template has tools."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_local.base.add import add_base
from adapterhub_local.registry import Registry
from adapterhub_local.settings import home as home_at
from tests.serve.adapter_makers import publish
from tests.serve.attacks.attacked import AttackedServer
from tests.serve.conftest import TOOL_TEMPLATE
from tests.tiny import save_tiny_model


@pytest.fixture(scope="session")
def attacked_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the base `tiny` and the adapter `alpha`."""
    folder = tmp_path_factory.mktemp("attacked")
    home = home_at(folder / "home")
    base = add_base("tiny", save_tiny_model(folder / "model", chat_template=TOOL_TEMPLATE), home, hub_id="some/tiny")
    publish(Registry(home), "alpha", base, seed=1, alias="prod")
    return home.root


@pytest.fixture(scope="session")
def attacked(attacked_home: Path) -> Iterator[AttackedServer]:
    """The server that is attacked."""
    running = AttackedServer(attacked_home)
    yield running
    assert running.stop() == 0, running.log.read_text()[-2000:]
