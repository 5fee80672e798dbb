"""Pages that everybody can use: axe finds nothing against WCAG 2.2 AA, and the keyboard alone is enough."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Server
from tests.serve.console.conftest import Console
from tests.serve.console.test_pages import PAGES, Look

RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


@pytest.fixture(scope="session")
def axe() -> str:
    """The rules as a script."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe is not installed: pip install axe-playwright-python")
    return (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")


def violations(page: Any, axe: str) -> list[str]:
    """What axe says against a page."""
    page.evaluate(axe)
    result = page.evaluate("rules => axe.run({runOnly: {type: 'tag', values: rules}})", RULES)
    return [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in result["violations"]]


@pytest.mark.parametrize("scheme", ["light", "dark", "phone"])
def test_axe_finds_nothing(console: Console, look: Look, axe: str, scheme: str) -> None:
    """On every page of the console, light, dark and on a phone."""
    size = {"width": 390, "height": 800} if scheme == "phone" else {"width": 1280, "height": 800}
    colours = "dark" if scheme == "dark" else "light"
    page = look(f"{console.url}/console", viewport=size, color_scheme=colours, bypass_csp=True)
    found = {}
    for path in PAGES:
        page.goto(f"{console.url}/console{path}")
        if said := violations(page, axe):
            found[path] = said
    assert not found


def test_axe_finds_nothing_in_the_playground(full_server: Server, look: Look, axe: str) -> None:
    """With columns, sliders and an answer."""
    page = look(f"{full_server.url}/console/play?m=tiny&m=sentiment@2*0.5%2Borigin@1*0.5&prompt=Hi", bypass_csp=True)
    assert not violations(page, axe)
    page.get_by_label("Form").select_option("text")
    page.get_by_label("token probabilities").check()
    page.get_by_label("Tokens").fill("8")
    page.get_by_role("button", name="Ask").click()
    page.get_by_text(re.compile("done$")).nth(1).wait_for()
    assert not violations(page, axe)


def test_the_keyboard_is_enough(console: Console, look: Look) -> None:
    """From the first page to an adapter, its parent and back with Tab and Enter; what has the focus can be seen."""
    page = look(f"{console.url}/console")

    def tab_to(pattern: str, most: int = 60) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            text = page.evaluate("document.activeElement.textContent.trim()")
            if re.search(pattern, text) and page.evaluate("document.activeElement.tagName.toLowerCase()") == "a":
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none"
                return
        raise AssertionError(f"nothing with {pattern} is reached")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    tab_to("^both@1$")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/console/adapters/both"))
    tab_to("^sentiment@2")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/console/adapters/sentiment\?v=2"))
