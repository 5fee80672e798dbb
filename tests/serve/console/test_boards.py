"""Leaderboards of tasks, and the history as a page."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.registry.gc import remove
from adapterhub_local.registry.split import set_split
from adapterhub_local.registry.tasks import tasks_in
from tests.serve.conftest import Server
from tests.serve.console.conftest import Console, fill, scored

Look = Callable[..., Any]


def places(page: Any) -> list[tuple[str, str]]:
    """Place and reference of each line."""
    lines = page.locator("tbody tr").all()
    return [(line.locator("td").first.inner_text(), line.locator("th").inner_text()) for line in lines]


def test_the_best_on_a_task_is_first(console: Console, look: Look) -> None:
    """From the tasks to who is best, with base, interval and place; every version if asked, by another score."""
    page = look(f"{console.url}/console")
    page.get_by_role("link", name="Tasks").click()
    assert page.locator("tbody th").all_inner_texts() == ["sentiment", "origin", "tone"]
    page.get_by_role("link", name="sentiment").click()
    assert places(page) == [("1", "sentiment@2"), ("2", "both@1")]
    assert "base 20.5 %" in page.locator("tbody tr").first.inner_text()
    page.get_by_label("Show").select_option("all")
    page.get_by_role("button", name="Show").click()
    assert places(page) == [("1", "sentiment@2"), ("2", "sentiment@1"), ("3", "both@1")]
    page.get_by_label("Score").select_option("loss")
    page.get_by_role("button", name="Show").click()
    assert [reference for _, reference in places(page)] == ["sentiment@2", "sentiment@1", "both@1"]
    assert "the lowest loss first" in page.locator("#count").inner_text()


def test_a_paired_difference_is_shown_and_other_data_named(built_base: Path, tmp_path: Path, look: Look) -> None:
    """A clear difference is marked, a base's score serves all rows with the same examples, other examples are named."""
    registry = Registry(tmp_path / "home")
    fill(registry, read_record(built_base))
    one, two, three = (registry.resolve(text) for text in ("sentiment@1", "sentiment@2", "tone"))
    difference = {"exact_match": {"value": 0.695, "interval": [0.6, 0.7], "is_clear": True}}
    measured = scored(0.9, 0.205)
    registry.add_evaluation(
        two, "same", {**measured, "data": "sha256:" + "a" * 64, "base": {**measured["base"], "difference": difference}}
    )
    registry.add_evaluation(one, "same", {"adapter": scored(0.8, 0.1)["adapter"], "data": "sha256:" + "a" * 64})
    registry.add_evaluation(three, "same", {"adapter": scored(0.95, 0.1)["adapter"], "data": "sha256:" + "b" * 64})
    running = Console(registry)
    try:
        page = look(f"{running.url}/console/tasks/same?versions=all")
        first, second, third = page.locator("tbody tr").all_inner_texts()
        assert "tone@1" in first
        assert "base" not in first
        assert "sentiment@2" in second
        assert "+69.5 points, clear" in second
        assert "sentiment@1" in third
        assert "base 20.5 %" in third
        assert "scored on different data" in page.locator("main").inner_text()
    finally:
        running.stop()


@pytest.mark.parametrize("path", ["tasks/nothing", "tasks/sentiment?metric=nothing", "tasks/sentiment?versions=x"])
def test_no_such_board(path: str, console: Console) -> None:
    """A page that says so, with what there is."""
    answer = httpx.get(f"{console.url}/console/{path}")
    assert answer.status_code in (400, 404)


def test_a_key_sees_its_own(built_base: Path, tmp_path: Path) -> None:
    """Tasks and places of the names that it may see; the history is for administrators."""
    registry = Registry(tmp_path / "home")
    fill(registry, read_record(built_base))
    registry.add_evaluation(registry.resolve("tone"), "tone", {"adapter": {"secret_score": 0.5}})
    _, token = Keys(registry.home).create(adapters=("origin",))
    running = Console(registry)
    try:
        headers = {"Authorization": f"Bearer {token}"}
        shown = httpx.get(f"{running.url}/console/tasks", headers=headers)
        assert "origin" in shown.text
        assert "sentiment" not in shown.text
        assert httpx.get(f"{running.url}/console/tasks/sentiment", headers=headers).status_code == 404
        assert "both@1" not in httpx.get(f"{running.url}/console/tasks/origin", headers=headers).text
        assert httpx.get(f"{running.url}/console/history", headers=headers).status_code == 403
        (base,) = httpx.get(f"{running.url}/v1/registry/bases", headers=headers).json()["data"]
        assert base["num_versions"] == 1
        unknown = httpx.get(f"{running.url}/v1/registry/adapters?sort=secret", headers=headers)
        assert unknown.status_code == 404
        assert "secret_score" not in unknown.text
    finally:
        running.stop()


def test_tasks_count_what_is_there(built_base: Path, tmp_path: Path) -> None:
    """Versions that were removed do not count; a task has its metrics once."""
    registry = Registry(tmp_path / "home")
    fill(registry, read_record(built_base))
    found = {one["task"]: one for one in tasks_in(registry)}
    assert (found["sentiment"]["num_names"], found["sentiment"]["num_versions"]) == (2, 3)
    assert found["sentiment"]["metrics"] == ["exact_match", "loss"]
    remove(registry, registry.resolve("sentiment@1"), force=True)
    assert {one["task"]: one["num_versions"] for one in tasks_in(registry)}["sentiment"] == 2
    assert [one["task"] for one in tasks_in(registry, ["tone"])] == ["tone"]
    assert tasks_in(registry, []) == []


def test_the_history_names_who(console: Console, look: Look) -> None:
    """What changed and who changed it; words narrow it."""
    page = look(f"{console.url}/console/history")
    assert page.locator("tbody tr").count() > 5
    page.get_by_label("Adapter").fill("tone")
    page.get_by_role("button", name="Show").click()
    assert all("tone" in text for text in page.locator("tbody th").all_inner_texts())


def test_keys_splits_and_use_are_on_the_servers_page(built_base: Path, tmp_path: Path) -> None:
    """Who may do what and how much of it, whose traffic is split, and who asked; nothing of a secret."""
    registry = Registry(tmp_path / "home")
    fill(registry, read_record(built_base))
    registry.set_alias("sentiment", "canary", 2)
    set_split(registry, "sentiment", [("canary", 1), ("prod", 3)])
    keys = Keys(registry.home)
    _, token = keys.create(scopes=("admin", "infer"), note="the boss")
    gone, _ = keys.create(rate="60/min", concurrency=2, adapters=("tone", "ori*"))
    keys.revoke(gone.id)
    running = Server(load_base(read_record(built_base), device="cpu"), registry)
    try:
        headers = {"Authorization": f"Bearer {token}"}
        body = {"model": "tone", "prompt": "abc", "max_tokens": 3}
        assert httpx.post(f"{running.url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
        page = httpx.get(f"{running.url}/console/server", headers=headers).text
        for text in ("the boss", "60/min, 2 at once", "revoked", "tone, ori*", "canary 25 %, prod 75 %", gone.id):
            assert text in page, text
        used = httpx.get(f"{running.url}/v1/server", headers=headers).json()["usage"]
        assert [(row["adapter"], row["requests"], row["completion_tokens"]) for row in used] == [("tone", 1, 3)]
        listed = httpx.get(f"{running.url}/v1/keys", headers=headers).json()["data"]
        assert listed[0]["id"] == gone.id
        assert token not in str(listed)
        assert all("digest" not in one for one in listed)
        split = [{"alias": "canary", "share": 1}, {"alias": "prod", "share": 3}]
        place = f"{running.url}/v1/registry/splits"
        assert httpx.get(place, headers=headers).json()["data"] == [{"name": "sentiment", "split": split}]
        other = {"split": [], "expect": [{"alias": "prod", "share": 1}]}
        assert httpx.put(f"{place}/sentiment", json=other, headers=headers).status_code == 409
        assert httpx.put(f"{place}/sentiment", json={"split": [], "expect": split}, headers=headers).status_code == 200
        assert httpx.get(place, headers=headers).json()["data"] == []
    finally:
        running.stop()
