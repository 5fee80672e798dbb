"""Whole tasks with Tab, Enter and letters alone: what has the focus is always seen, and stays where it was."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.settings import home as home_at
from serve.registry_api.starting import FOLDER
from tests.patience import PATIENCE
from tests.recipes import MINIMAL
from tests.serve.conftest import Server
from tests.serve.console.conftest import Console, fill

WAIT = 1000 * PATIENCE
MOST = 150  # stops on the way to something
# what a screen reader would call it, whether an outline is seen around it, and whether it is in the window
STOP = """() => {
    const at = document.activeElement, style = getComputedStyle(at), box = at.getBoundingClientRect();
    const label = at.getAttribute('aria-label') ?? [...(at.labels ?? [])].map(one => one.textContent).join(' ');
    const isText = ['BUTTON', 'A', 'SUMMARY', 'a'].includes(at.tagName);
    return {
        name: (isText || !label ? at.textContent || label : label).trim().replace(/\\s+/g, ' '),
        tag: at.tagName.toLowerCase(),
        isMarked: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2,
        isSeen: box.bottom > 0 && box.top < innerHeight && box.width > 0 && box.height > 0,
    };
}"""


class Keyboard:
    """A person with no mouse before a page."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def to(self, name: str, tag: str = "") -> "Keyboard":
        """Press Tab until what is called so has the focus."""
        passed = []
        for _ in range(MOST):
            self.page.keyboard.press("Tab")
            stop = self.page.evaluate(STOP)
            if stop["tag"] == "body":  # past the last one
                continue
            assert stop["isMarked"], stop
            assert stop["isSeen"], stop
            passed.append(stop["name"][:60])
            if re.search(name, stop["name"]) and tag in ("", stop["tag"]):
                return self
        raise AssertionError(f"{name} is not reached: {passed}")

    def write(self, text: str) -> "Keyboard":
        """Write into a field, in place of what is in it."""
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(text)
        return self

    def enter(self, address: str) -> "Keyboard":
        """Press Enter, and come to a page whose address has this in it."""
        with self.page.expect_navigation(url=re.compile(address)):
            self.page.keyboard.press("Enter")
        return self


@pytest.fixture
def closed(built_base: Path, tmp_path: Path) -> Iterator[Console]:
    """A console with a key, adapters, their base and a recipe."""
    registry = Registry(home_at(tmp_path / "home"))
    shutil.copytree(built_base, registry.home.bases / "tiny")
    fill(registry, read_record(registry.home.bases / "tiny"))
    folder = registry.home.root / FOLDER
    folder.mkdir()
    (folder / "sums.toml").write_text(MINIMAL, encoding="utf-8")
    (folder / "train.jsonl").write_text('{"prompt": "1", "completion": "2"}\n' * 8, encoding="utf-8")
    running = Console(registry)
    running.keys["all"] = Keys(registry.home).create(scopes=("infer", "admin"))[1]
    yield running
    running.stop()


def test_a_day_without_a_mouse(closed: Console, look: Callable[..., Any]) -> None:
    """Sign in, search, move an alias, compare two versions, see what a merge loses, start a run, sign out."""
    page = look(f"{closed.url}/console")
    hands = Keyboard(page)
    hands.to("^API key").write(closed.keys["all"]).enter("/console$")
    hands.to("^Search").write("review").enter("q=review")
    hands.to("^sentiment@2$", "a").enter("/console/adapters/sentiment")

    hands.to("points to version").write("2").enter("/console/adapters/sentiment")
    page.get_by_text("prod → 2").first.wait_for()
    assert closed.registry.aliases("sentiment") == {"prod": 2}

    hands.to("^Compare$", "button").enter("/console/compare")
    assert hands.page.get_by_role("heading", name="Modules").count() == 1

    hands.to("^Merge$", "a").enter("/console/merge")
    for reference in ("sentiment@2", "origin@1"):
        hands.to("^Adapter").write(reference).to("^Weight").write("0.5")
    hands.to("^See what it loses", "button").enter("job=")
    page.locator("#error").wait_for(timeout=WAIT)

    hands.to("^Runs$", "a").enter("/console/runs")
    hands.to("^Start a run$", "a").enter("/console/runs/new")
    hands.to("^Changes").write("train.max_steps=2")
    hands.to("^Show what it takes", "button").enter("job=")
    page.get_by_text(re.compile("It fits|It does not fit")).wait_for(timeout=WAIT)
    if page.get_by_text("It does not fit").count():
        hands.to("^Start it although").page.keyboard.press("Space")
    hands.to("^Start the run", "button").enter("/console/jobs/")

    hands.to("^Sign out", "button").enter("/console/login")
    assert closed.registry.aliases("sentiment") == {"prod": 2}


def test_the_playground_without_a_mouse(full_server: Server, look: Callable[..., Any]) -> None:
    """A prompt, a column more with the focus in it, an answer in each, token by token with the arrow keys."""
    page = look(f"{full_server.url}/console/play?m=tiny")
    hands = Keyboard(page)
    hands.to("^Prompt").page.keyboard.type("Hello")
    hands.to("^Form").page.keyboard.type("p")
    hands.to("^Tokens").write("4")
    hands.to("token probabilities").page.keyboard.press("Space")
    hands.to("^Add a column", "button").page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.name") == "m"
    hands.write("sentiment@2")
    page.keyboard.press("Tab")
    hands.to("^Ask$", "button").page.keyboard.press("Enter")
    page.get_by_text(re.compile("done$")).nth(1).wait_for(timeout=WAIT)
    hands.to("^Answer")
    page.keyboard.press("ArrowRight")
    assert page.locator(".answer .current").count() == 1
    hands.to("^Answer")
    page.keyboard.press("ArrowRight")
    assert page.locator(".answer .current").count() == 2


def test_the_server_page_keeps_the_focus(full_server: Server, look: Callable[..., Any]) -> None:
    """While its numbers are loaded again, what has the focus keeps it, and the tables' places stay."""
    page = look(f"{full_server.url}/console/server")
    page.evaluate("window.isSame = true")
    Keyboard(page).to("^AdapterState", "div")
    before = page.evaluate("document.activeElement.outerHTML.length")
    assert full_server.complete(model="tone", prompt="Hi").status_code == 200
    page.locator("#live th", has_text="tone").wait_for(timeout=WAIT)
    assert page.evaluate("document.activeElement.outerHTML.length") > before
    assert page.evaluate("window.isSame") is True
