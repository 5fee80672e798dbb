"""Texts that hide, turn letters round or have no end: on every page they are seen, and move nothing but themselves."""

from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest

from adapterhub_local.registry import Registry
from adapterhub_local.settings import home as home_at
from serve.console.texts import cut, exact, shown
from tests.patience import PATIENCE
from tests.serve.console.conftest import Console
from tests.serve.console.hostile import LONG, TEXT, TURNED, UNSEEN, publish_hostile
from tests.serve.console.test_pages import Look
from tests.stores import LINEAGE, files

PAGES = {
    "the list": "", "every version": "?versions=all", "a search": f"?q={quote(TEXT, errors='replace')}",
    "an adapter": "/adapters/turned", "its first version": "/adapters/turned?v=1", "a long one": "/adapters/long",
    "a comparison": "/compare?left=turned%401&right=turned%402", "a long one's": "/compare?left=long%401&right=turned",
    "bases": "/bases", "an error": f"/adapters/{quote(TEXT, errors='replace')}", "runs": "/runs", "server": "/server",
    "a merge": f"/merge?m={quote(TEXT, errors='replace')}&w=1",
}  # fmt: skip
# elements whose own text is from elsewhere and whose direction reaches what stands beside it
REACHING = """mark => {
    const found = [];
    const walk = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const text = walk.currentNode, holder = text.parentElement;
        if (!text.textContent.includes(mark) || holder.closest('textarea, option, title')) continue;
        const apart = /isolate|plaintext/.test(getComputedStyle(holder).unicodeBidi);
        const alone = [...holder.childNodes].every(one => one === text || !one.textContent.trim());
        const block = !/inline/.test(getComputedStyle(holder).display);
        if (!apart && !(alone && block)) found.push(holder.outerHTML.slice(0, 200));
    }
    return found;
}"""


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """A console over adapters of which everything was said by an enemy, in a few letters and in a megabyte."""
    registry = Registry(home_at(tmp_path_factory.mktemp("turned")))
    publish_hostile(registry, "turned", TEXT)
    publish_hostile(registry, "long", LONG)
    running = Console(registry)
    yield running
    running.stop()


@pytest.mark.parametrize("page", PAGES)
def test_nothing_hides_or_turns(turned: Console, page: str) -> None:
    """No page holds a character that hides or turns others but in the value of a field, and each is a small one."""
    answer = httpx.get(f"{turned.url}/console{PAGES[page]}", headers={"Accept": "text/html"}, timeout=PATIENCE,
                       trust_env=False)  # fmt: skip
    assert answer.status_code in (200, 400, 404), answer.text
    assert "text/html" in answer.headers["content-type"]
    assert len(answer.content) <= 60_000
    text = answer.text.replace(str(exact(TEXT)), "").replace(str(exact(TEXT.strip())), "")
    assert not [letter for letter in UNSEEN if letter in text]
    assert "<img" not in text
    assert "{{ 49 }}" not in text
    assert text.count("</script>") == text.count("<script ")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_reaches_its_neighbours(turned: Console, look: Look, page: str, width: int) -> None:
    """What is written from right to left is apart from what follows it, and nothing is wider than its window."""
    opened = look(
        f"{turned.url}/console{PAGES[page]}", viewport={"width": width, "height": 800}, expected=("400", "404")
    )
    assert opened.evaluate(REACHING, "\u05e9\u05dc\u05d5\u05dd") == []
    assert opened.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    assert opened.locator("main img").count() == 0


def test_a_long_text_says_how_long_it_is() -> None:
    """A cut text takes no more of a page than it may, whatever its letters are, and names its length."""
    for letter in ("W", "&", "\u202e", "\u6f22", '"', "\U000e0041", "\ud800"):
        shorter = cut(letter * 100_000, 500)
        assert len(str(exact(shorter)).encode()) <= 530
        assert "(100,000 letters)" in shorter
    assert cut("W" * 500, 500) == "W" * 500
    assert cut(None) == ""
    assert shown(TURNED).isprintable()


@pytest.mark.parametrize("letter", ["W", "m", "i", "w@", "\u6f22", "\u05e9", "Customer-Support-"])
def test_no_text_leaves_its_box(registry: Registry, look: Look, letter: str) -> None:
    """Of wide letters and narrow ones as much is written in a box of a lineage as has room in it."""
    data = [{"role": letter * 60, "file": letter * 60, "rows": 1, "digest": "sha256:" + "a" * 64}]
    registry.publish("made", files(1), {**LINEAGE, "data": data, "base": {"name": letter * 40}})
    console = Console(registry)
    try:
        page = look(f"{console.url}/console/adapters/made")
        over = page.evaluate(
            "() => [...document.querySelectorAll('.graph > g, .graph > a')].flatMap(node => {"
            " const right = node.querySelector('rect').getBoundingClientRect().right;"
            " return [...node.querySelectorAll('text')].map(text => text.getBoundingClientRect().right - right); })"
        )
        assert len(over) == 4
        assert max(over) <= 0
    finally:
        console.stop()


def test_a_lineage_that_is_none_has_its_page(registry: Registry) -> None:
    """Data and notes of another form than ours are shown as they are, on the page and as a graph."""
    registry.publish("odd", files(1), {**LINEAGE, "data": ["a.jsonl", 7], "notes": "only one", "samples": ["b"]})
    console = Console(registry)
    try:
        page = httpx.get(f"{console.url}/console/adapters/odd", timeout=PATIENCE, trust_env=False)
        assert page.status_code == 200
        assert "a.jsonl" in page.text
        assert "only one" in page.text
        graph = httpx.get(f"{console.url}/v1/registry/lineage/odd", timeout=PATIENCE, trust_env=False)
        assert [node["label"] for node in graph.json()["nodes"]] == ["odd@1", "a.jsonl", "7"]
    finally:
        console.stop()


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/nothing-such", 404, "/console/nothing-such"), (f"?q={'q' * 501}", 400, "500"),
        (f"/login?next={'q' * 501}", 400, "500"), ("/compare?left=a", 400, "choose two versions"),
    ],
)  # fmt: skip
def test_errors_are_pages_for_people(turned: Console, path: str, status: int, said: str) -> None:
    """A browser gets a page with the reason and the way back under our policy; a program still gets JSON."""
    answer = httpx.get(f"{turned.url}/console{path}", headers={"Accept": "text/html,*/*"}, trust_env=False)
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/html")
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-request-id"]
    assert "That did not work" in answer.text
    assert said in answer.text
    plain = httpx.get(f"{turned.url}/console{path}", headers={"Accept": "application/json"}, trust_env=False)
    assert plain.status_code == status
    assert path.startswith("/compare") or plain.json()["error"]["message"]
