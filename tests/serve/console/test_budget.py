"""However much a registry holds, a page has at most 60 kB and 1,500 elements, and says what it leaves out and where."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from adapterhub_local.registry import Registry
from adapterhub_local.registry.marks import add_tags
from adapterhub_local.settings import home as home_at
from serve.console.budget import BYTES, NODES, size_of
from tests.patience import PATIENCE
from tests.serve.console.conftest import Console
from tests.serve.console.hostile import many_tasks, scores
from tests.serve.console.test_pages import Look
from tests.stores import LINEAGE, files

SAMPLE = {name: f"{name} " * 290 for name in ("prompt", "wanted", "base", "adapter")}  # 2,000 letters, as runs keep
PAGES = {
    "four tasks a row": "", "the page after it": "?sort=created", "every version": "?versions=all",
    "250 versions": "/adapters/often", "2,000 tasks": "/adapters/wide",
    "a comparison": "/compare?left=wide%401&right=wide%402",
    "5,000 files": "/adapters/fed", "20 long samples": "/adapters/shown", "2,000 notes and tags": "/adapters/noted",
    "bases": "/bases",
}  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """A console over adapters with more of everything than a page holds."""
    registry = Registry(home_at(tmp_path_factory.mktemp("large")))
    for index in range(60):
        base = {"name": f"base-number-{index}", "fingerprint": f"sha256:{index:064}"}
        made = registry.publish(f"row-{index:02}", files(index), many_tasks(4) | {"base": base}, alias="prod")
        add_tags(registry, made, ("english", "reviewed", "candidate"))
    for index in range(250):
        registry.publish("often", files(index), LINEAGE | {"metrics": {"sentiment": scores()}})
    for seed in (1, 2):
        changed = {f"task-number-{index}": scores(f"metric{seed}") for index in range(2000)}
        settings = {f"key-{index}": seed for index in range(2000)}
        registry.publish("wide", files(seed), LINEAGE | {"metrics": changed, "recipe": {"resolved": settings}})
    data = [{"role": "train", "file": f"part-{index:05}.jsonl", "rows": 9, "digest": f"sha256:{index:064}"}
            for index in range(5000)]  # fmt: skip
    registry.publish("fed", files(1), LINEAGE | {"data": data})
    curve = [[step, 3 / step] for step in range(1, 900)]
    training = {"curve": curve, "held_out": curve, "learning_rate": curve}
    registry.publish("shown", files(2), LINEAGE | {"samples": [SAMPLE] * 20, "training": training})
    noted = registry.publish("noted", files(3), LINEAGE | {"notes": [f"note {index} " * 30 for index in range(2000)]})
    add_tags(registry, noted, tuple(f"tag-{index}" for index in range(200)))
    for number in range(300):
        registry.set_alias("noted", f"alias-{number}", 1)
    running = Console(registry)
    yield running
    running.stop()


def get(console: Console, path: str) -> httpx.Response:
    answer = httpx.get(f"{console.url}/console{path}", timeout=PATIENCE, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_small(large: Console, page: str) -> None:
    """Bytes and elements of every page stay within the budget."""
    size, nodes = size_of(get(large, PAGES[page]).content)
    assert size <= BYTES
    assert nodes <= NODES


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", r"and 2 more</a>"),
        ("", r"<option disabled>20 more are on the page Bases</option>"),
        ("/bases", r"50 of 60: <a href=\"/v1/registry/bases\">"),
        ("/adapters/wide", r"[3-9],\d{3} more scores are in <a href=\"/v1/registry/versions/wide%402\">"),
        ("/compare?left=wide%401&right=wide%402", r"[1-9],\d{3} more are in <a href=\"/v1/registry/compare\?left="),
        ("/adapters/fed", r"4,9\d\d more files are in <a href=\"/v1/registry/versions/fed%401\">"),
        ("/adapters/shown", r"1\d more are in <a href="),
        ("/adapters/noted", r"19\d\d more notes</a>"),
        ("/adapters/noted", r"1\d\d more tags</a>"),
        ("/adapters/noted", r"2\d\d more aliases</a>"),
    ],
)
def test_what_is_left_out_is_named(large: Console, path: str, said: str) -> None:
    """A page that does not show all says how much more there is, and leads to it."""
    text = get(large, path).text
    found = re.search(said, text)
    assert found, "it is not said"
    for link in re.findall(r'href="(/v1/[^"]+)"', text):
        assert httpx.get(large.url + link.replace("&amp;", "&"), trust_env=False).status_code == 200


def test_all_rows_and_versions_are_on_some_page(large: Console, look: Look) -> None:
    """Page by page every name and every version comes once, the newest versions first; few stops precede the alias."""
    page = look(f"{large.url}/console")
    names: list[str] = []
    while True:
        names += page.locator("tbody th a").all_inner_texts()
        if not page.get_by_role("link", name="Next page").count():
            break
        page.get_by_role("link", name="Next page").click()
    assert len(names) == len(set(names)) == 65
    page.goto(f"{large.url}/console/adapters/often")
    shown = _versions(page)
    assert shown == [f"often@{number}" for number in range(250, 250 - len(shown), -1)]
    assert len(shown) == 50
    before = page.evaluate(
        "() => { const stops = [...document.querySelectorAll('a, button, input:not([type=hidden]):not([type=radio]),"
        " [tabindex]')]; return stops.indexOf(document.querySelector('input[name=alias]')); }"
    )
    assert before < 100
    while page.get_by_role("link", name="older ones").count():
        page.get_by_role("link", name="older ones").click()
        shown += _versions(page)
    assert shown == [f"often@{number}" for number in range(250, 0, -1)]


def _versions(page: Any) -> list[str]:
    found: list[str] = page.get_by_role("region", name="Versions").locator("tbody th a").all_inner_texts()
    return found


def test_no_row_comes_twice_while_others_publish(registry: Registry, look: Look) -> None:
    """Page by page every name comes once, though names and versions are added between two clicks."""
    before = [f"row-{index:03}" for index in range(120)]
    for index, name in enumerate(before):
        registry.publish(name, files(index), LINEAGE)
    console = Console(registry)
    try:
        page = look(f"{console.url}/console")
        shown = page.locator("tbody th a").all_inner_texts()
        for turn in range(2):
            for index in range(10):
                registry.publish(f"new-{turn}-{index}", files(index), LINEAGE)
                registry.publish(before[100 * turn + index], files(500 + index), LINEAGE)
            page.get_by_role("link", name="Next page").click()
            page.wait_for_url(re.compile("after="))
            shown += page.locator("tbody th a").all_inner_texts()
        names = [one.partition("@")[0] for one in shown]
        assert len(names) == len(set(names))
        assert set(names) >= set(before)
    finally:
        console.stop()
