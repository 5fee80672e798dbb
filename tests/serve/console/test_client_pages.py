"""Long lists of a server: `qhub` asks for no more pages than it shows, and shows what that machine would."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_local.registry import Registry
from adapterhub_local.settings import home as home_at
from serve.http.console import console_app
from serve.options import HttpOptions
from tests.serve.console.attacker import Watched
from tests.serve.console.conftest import Console
from tests.serve.console.hostile import scores
from tests.serve.console.test_client import Call, call
from tests.stores import LINEAGE, files

__all__ = ["call"]
NAMES, MANY = 450, 230
# a command, and how many pages of 200 entries it takes; one more where it names the number of all that there are
COMMANDS = {
    "list": 2,
    "list --limit 5": 2,
    "list --limit 0": 3,
    "list --limit 250": 3,
    "list --limit 5 --json": 1,
    "list --sort created --limit 3": 2,
    "list --sort created --tag none": 1,
    "list often --limit 2": 2,
    "list --base tiny --limit 3": 1,
    "list --task sentiment --limit 4": 2,
    "list --sort exact_match --limit 2": 2,
    "search yes no --limit 3": 1,
}


@pytest.fixture(scope="module")
def long_list(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """A console over many names, one of which has many versions with scores."""
    registry = Registry(home_at(tmp_path_factory.mktemp("long")))
    for index in range(NAMES):
        registry.publish(f"name-{index:03}", files(index % 7), LINEAGE)
    for index in range(MANY):
        metrics = {"sentiment": scores()} | ({"best": scores()} if index == 3 else {})
        registry.publish("often", files(index), LINEAGE | {"metrics": metrics})
    running = Console(registry, Watched(console_app(registry, HttpOptions())))
    yield running
    running.stop()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_more_pages_than_are_shown(command: str, long_list: Console, call: Call, tmp_path: Path) -> None:
    """The output is that of the machine itself, with as many questions as the entries need."""
    here = call(command, long_list.registry.home.root)
    long_list.app.arrived.clear()
    there = call(command, tmp_path / "none", long_list.url)
    pages = [one for one in long_list.app.arrived if one.path == "/v1/registry/adapters"]
    assert len(pages) == COMMANDS[command]
    assert there[0] == here[0] == 0
    if "--json" in command:
        references = [[line for line in said[1].splitlines() if '"reference"' in line] for said in (here, there)]
        assert references[0] == references[1]
    elif not command.startswith("search") and "exact_match" not in command:  # there equal scores have another order
        assert there[1:] == here[1:]
    assert len(there[1].splitlines()) > 2 or "none" in command
