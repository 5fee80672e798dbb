"""What a person sees: rows, words, order and one adapter, in a browser that asks nobody but the server."""

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from adapterhub_local.settings import Home
from tests.serve.console.conftest import HOSTILE, Console

PAGES = ("", "?q=sentiment", "/adapters/both", "/adapters/sentiment?v=1", "/bases", "/runs", "/runs/new", "/server",
         "/merge", "/merge/methods?m=sentiment%402&w=0.6&m=origin%401&w=0.4&method=ties&density=0.2",
         "/alias?name=sentiment&alias=prod&do=remove", "/tasks", "/tasks/sentiment?versions=all", "/history",
         "/compare?left=sentiment%401&right=sentiment%402", "/login")  # fmt: skip
Look = Callable[..., Any]


def rows(page: Any) -> list[str]:
    """The references of the list, in their order."""
    return page.locator("tbody th a").all_inner_texts()


def test_the_first_page_is_whole_and_asks_nobody_else(console: Console, look: Look) -> None:
    """The list has a row a name and comes with its policy; two requests go to the server and none elsewhere."""
    page = look(f"{console.url}/console")
    assert page.title() == "Adapters · qhub"
    assert rows(page) == ["both@1", "origin@1", "sentiment@2", "tone@1"]
    policy = page.answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert len([url for url in page.asked if not url.startswith("data:")]) == 2
    bar = page.get_by_role("img", name="sentiment, exact match: 89.5 %, 95 % interval 84.5 % to 93.5 %, base 20.5 %")
    assert bar.count() == 1


@pytest.mark.parametrize("has_scripts", [True, False])
def test_words_and_order_are_in_the_address(console: Console, look: Look, has_scripts: bool) -> None:
    """A search narrows the list, going back widens it, the best comes first, and a reload keeps it: scripts or none."""
    page = look(f"{console.url}/console", java_script_enabled=has_scripts)
    count = len(rows(page))
    page.get_by_label("Search").fill("review")
    page.get_by_label("Search").press("Enter")
    page.wait_for_url(re.compile(r"\?q=review"))
    assert rows(page) == ["sentiment@2"]
    page.go_back()
    assert len(rows(page)) == count
    page.get_by_label("Sort by").select_option("exact_match")
    page.get_by_role("button", name="Show").click()
    page.wait_for_url(re.compile("sort=exact_match"))
    assert rows(page)[:2] == ["sentiment@2", "both@1"]
    page.reload()
    assert rows(page)[:2] == ["sentiment@2", "both@1"]
    page.goto(f"{console.url}/console?tag=candidate")
    assert rows(page) == ["both@1"]


def test_one_adapter_shows_where_it_comes_from(console: Console, look: Look) -> None:
    """Scores stand beside intervals and the base; the graph has every node and weight, and leads to the parents."""
    page = look(f"{console.url}/console/adapters/both")
    table = page.get_by_role("region", name="Scores")
    assert "80.0 %" in table.inner_text()
    assert "75.0 % to 84.0 %" in table.inner_text()
    assert "20.5 %" in table.inner_text()
    graph = page.get_by_role("group", name="What this was made of")
    assert graph.locator("rect").count() == 4  # the merge, two parents, and the one data file of both
    assert set(graph.locator("text.weight").all_text_contents()) == {"0.6", "0.4"}
    page.keyboard.press("Tab")
    links = graph.locator("a")
    for index in range(links.count()):
        links.nth(index).focus()
        assert page.evaluate("document.activeElement.tagName.toLowerCase()") == "a"
    graph.get_by_role("link", name=re.compile("sentiment@2")).click()
    page.wait_for_url(re.compile(r"/console/adapters/sentiment\?v=2"))
    assert page.get_by_text("The film was a joy.").count() >= 1
    assert page.get_by_role("img", name="Losses of sentiment@2").count() == 1
    assert page.get_by_role("img", name="Scores over versions").count() == 1
    assert page.get_by_text("prod → 1").count() == 1


def test_two_versions_are_compared_down_to_their_modules(console: Console, look: Look) -> None:
    """The page has what differs in the recipe, and, once measured, the cosines that `qhub diff` prints."""
    page = look(f"{console.url}/console/adapters/sentiment")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_url(re.compile("/console/compare"))
    settings = page.get_by_role("region", name="Recipe, data and parents").inner_text()
    assert "recipe.resolved.train.epochs" in settings
    page.get_by_role("button", name=re.compile("Measure")).click()
    page.get_by_text("modules. The cosine is 1").wait_for(timeout=90_000)
    references = ("sentiment@1", "sentiment@2")
    command = [sys.executable, "-m", "adapterhub_local", "diff", *references, "--json"]
    environment = {"QHUB_HOME": str(console.registry.home.root), "PATH": "/usr/bin:/bin", "PYTHONPATH": "."}
    done = subprocess.run(command, capture_output=True, check=True, env=environment, timeout=90)
    expected = json.loads(done.stdout)["modules"]
    page.get_by_text("Every module").click()
    table = page.locator("#live tbody tr")
    assert table.count() == len(expected)
    for index, module in enumerate(expected):
        cells = table.nth(index).locator("th, td").all_inner_texts()
        assert cells == [module["module"], *(f"{module[side]:.4g}" for side in ("left", "right", "cosine"))]


def test_two_tabs_do_not_overwrite_each_other(console: Console, look: Look) -> None:
    """Who moves an alias from a page that is out of date is told where it points now, and nothing is changed."""
    first, second = (look(f"{console.url}/console/adapters/sentiment", expected=("409",)) for _ in range(2))
    for page, version in ((first, "2"), (second, "1")):
        page.get_by_label("points to version").fill(version)
    before = len(console.registry.database.rows("SELECT 1 FROM alias_log WHERE name = 'sentiment'"))
    first.get_by_role("button", name="Move").click()
    first.get_by_text("prod → 2").wait_for()
    second.get_by_role("button", name="Move").click()
    assert "sentiment@prod points to 2, not to 1: nothing was changed" in second.get_by_role("alert").inner_text()
    assert console.registry.aliases("sentiment") == {"prod": 2}
    assert len(console.registry.database.rows("SELECT 1 FROM alias_log WHERE name = 'sentiment'")) == before + 1
    console.registry.set_alias("sentiment", "prod", 1)


def test_what_is_hostile_is_shown_as_text(console: Console, look: Look) -> None:
    """Markup, scripts and templates in what was said of an adapter are letters on every page, and nothing is asked."""
    page = look(f"{console.url}/console/adapters/both", expected=("400",))
    assert HOSTILE.replace("\u202e", "\\u202e") in page.inner_text("main")
    assert "\u202e" not in page.content()
    assert page.locator("main img").count() == 0
    page.goto(f"{console.url}/console?q={HOSTILE.replace('{', '%7B')}")
    assert page.get_by_label("Search").input_value() == HOSTILE
    answer = page.goto(f"{console.url}/console/adapters/%3Cscript%3Ealert(1)%3C%2Fscript%3E")
    assert answer.status == 400
    assert "is not a name" in page.get_by_role("alert").inner_text()


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("look_of", ["light", "dark", "phone"])
def test_no_page_is_wider_than_its_window(console: Console, look: Look, path: str, look_of: str) -> None:
    """In light and dark and on a phone of 390 pixels nothing has to be pushed aside to be read."""
    size = {"width": 390, "height": 800} if look_of == "phone" else {"width": 1280, "height": 800}
    scheme = "dark" if look_of == "dark" else "light"
    page = look(f"{console.url}/console{path}", viewport=size, color_scheme=scheme, reduced_motion="reduce")
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    assert page.locator("h1").count() == 1
    assert page.evaluate("document.getAnimations().length") == 0


@pytest.mark.parametrize("path", PAGES)
def test_pages_are_small(console: Console, path: str) -> None:
    """A page has at most 60 kB of HTML, its scripts and styles together at most 30 kB compressed."""
    with httpx.Client(base_url=console.url, trust_env=False) as client:
        text = client.get(f"/console{path}").text
        assert len(text.encode()) <= 60_000
        files = re.findall(r'(?:src|href)="(/console/static/[^"]+)"', text)
        assert 1 <= len(files) <= 5
        assert sum(len(gzip.compress(client.get(file).content)) for file in files) <= 30_000
        assert not re.search(r'(?:src|href)="(?!/console|/v1/registry/|data:,|#)', text)
        assert "style=" not in text
        assert "onclick" not in text


def test_the_console_starts_without_torch(home: Home) -> None:
    """What `qhub console` imports knows no torch, and its command is as light as any other's."""
    code = (
        "import sys\nfrom serve.console_server import run_console\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
