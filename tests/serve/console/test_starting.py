"""Runs that are started over HTTP, of recipes that lie on the machine: what they take first, files stay as named."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.train.past_runs import list_runs
from serve.jobs import Jobs
from serve.registry_api.library import Library
from serve.registry_api.starting import FOLDER, StartBody, choose
from tests.patience import PATIENCE
from tests.recipes import MINIMAL
from tests.serve.console.conftest import Console

Look = Callable[..., Any]
ROWS = [{"prompt": f"{number} and {number}?", "completion": f" {2 * number}."} for number in range(8)]
RECIPE = f"{MINIMAL}\n[adapter]\nrank = 4\n\n[train]\nmax_steps = 2\nbatch_size = 4\n"
TAKEN = ("train.seed=1", "train.learning_rate = 2e-4", "adapter.rank=8", "data.limit=4", "train.compute=float32",
         "train.compute='float32'", "train.activation_checkpointing=false")  # fmt: skip
REFUSED = (
    "data.train=/etc/passwd", "data.train=other", "data.test=x.jsonl", "output.name=other", "base.name=other",
    "reward.python=x.py", "extends=x.toml", "train.seed", "train.seed=", "train.x-y=1", "", "train", "=1",
    "train.compute='../x.toml'", "train.compute=a.b", "adapter.targets=['q_proj', '/etc']", "train.seed={a=1}",
    "train.seed=1\ndata.train='x.jsonl'", "adapter.start=one@1",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """A console beside a base, with a recipe that can be trained, one that cannot, and a file that is none."""
    registry = Registry(tmp_path_factory.mktemp("starting"))
    shutil.copytree(built_base, registry.home.bases / "tiny")
    folder = registry.home.root / FOLDER
    folder.mkdir()
    (folder / "sums.toml").write_text(RECIPE, encoding="utf-8")
    (folder / "broken.toml").write_text("[base]\nname = 3\n", encoding="utf-8")
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), encoding="utf-8")
    (registry.home.root / "outside.toml").write_text(RECIPE, encoding="utf-8")
    running = Console(registry)
    yield running
    running.stop()


def ask(place: Console, path: str, body: Any, key: str | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{place.url}/v1{path}", json=body, headers=headers, timeout=PATIENCE)


def ended(place: Console, job: dict[str, Any]) -> dict[str, Any]:
    """A job once it has ended."""
    end = time.monotonic() + PATIENCE
    while job["state"] == "running" and time.monotonic() < end:
        time.sleep(0.1)
        job = httpx.get(f"{place.url}/v1/jobs/{job['id']}").json()
    return job


def test_recipes_that_are_there(place: Console) -> None:
    """Those of the folder alone, with what is wrong with the one that cannot be used."""
    found = httpx.get(f"{place.url}/v1/recipes").json()["data"]
    assert [(one["recipe"], one["name"], one["base"]) for one in found] == [
        ("broken.toml", None, None), ("sums.toml", "sentiment", "tiny"),
    ]  # fmt: skip
    assert "base.name" in found[0]["problem"]
    assert found[1]["problem"] is None


@pytest.mark.parametrize("change", TAKEN)
def test_numbers_and_words_can_be_changed(change: str, place: Console) -> None:
    """What no file is named by; the plan is made of the recipe with the change."""
    library = Library(place.registry, Jobs(place.registry.home))
    chosen = choose(library, None, StartBody(recipe="sums.toml", set=[change]))
    assert chosen.command("plan")[2:] == ["--set", change, "--json"]
    assert chosen.recipe.overrides == (change,)


@pytest.mark.parametrize("change", REFUSED)
def test_files_and_code_cannot_be_changed(change: str, place: Console) -> None:
    """Whoever has a key reads no file by it that the recipe does not name, and runs no code."""
    for path in ("/plans", "/runs"):
        answer = ask(place, path, {"recipe": "sums.toml", "set": [change]})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "set"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"recipe": "sums.toml", "run": "x"}, 400),
        ({"recipe": "nothing.toml"}, 404),
        ({"recipe": "../outside.toml"}, 404),
        ({"recipe": "train.jsonl"}, 404),
        ({"recipe": "broken.toml"}, 400),
        ({"run": "nothing"}, 404),
        ({"recipe": "sums.toml", "set": "train.seed=1"}, 400),
        ({"recipe": "sums.toml", "text": RECIPE}, 400),
        ({"recipe": "sums.toml", "set": ["train.seed=1"] * 51}, 400),
    ],
)
def test_what_cannot_be_started(body: dict[str, Any], status: int, place: Console) -> None:
    """Nothing begins, and the reason is given."""
    for path in ("/plans", "/runs"):
        answer = ask(place, path, body)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]
    assert list_runs(place.registry.home) == []


def test_a_run_from_its_recipe_to_its_version(place: Console, look: Look) -> None:
    """On the pages: a recipe with a change, what it takes, only then the button, the job, and the version it made."""
    page = look(f"{place.url}/console/runs")
    page.get_by_role("link", name="Start a run").click()
    assert page.locator("option[disabled]").inner_text() == "broken.toml, cannot be used"
    page.locator("select[name=recipe]").select_option("sums.toml")
    page.get_by_label("Changes").fill("train.seed=5\n\ntrain.max_steps=1")
    assert page.get_by_role("button", name="Start the run").count() == 0
    page.get_by_role("button", name="Show what it takes").click()
    page.get_by_role("button", name="Start the run").wait_for(timeout=PATIENCE * 1000)
    assert "It fits" in page.get_by_role("status").inner_text()
    page.get_by_role("button", name="Start the run").click()
    page.get_by_role("link", name="To sentiment@1").wait_for(timeout=PATIENCE * 1000)
    page.get_by_role("link", name="To sentiment@1").click()
    assert page.locator("h1").inner_text().startswith("sentiment")
    (run,) = list_runs(place.registry.home)
    assert run.record["overrides"] == ["train.seed=5", "train.max_steps=1"]
    page.goto(f"{place.url}/console/runs/{run.id}")
    page.get_by_role("link", name="Start another with this recipe").click()
    assert run.id in page.locator("main").inner_text()
    assert page.get_by_role("button", name="Show what it takes").count() == 1


def test_the_button_is_for_what_was_planned(place: Console) -> None:
    """A plan of another recipe, of other changes or of none starts nothing, and the form keeps what was written."""
    job = ended(place, ask(place, "/plans", {"recipe": "sums.toml", "set": ["train.seed=7"]}).json())
    before = len(list_runs(place.registry.home))
    for fields in ({"changes": "train.seed=8", "job": job["id"]}, {"changes": "train.seed=7", "job": "0" * 16}):
        answer = httpx.post(
            f"{place.url}/console/runs/start", data={"recipe": "sums.toml", **fields}, headers={"Origin": place.url}
        )
        assert answer.status_code == 400
        assert "look at what the run takes first" in answer.text
        assert fields["changes"] in answer.text
    assert len(list_runs(place.registry.home)) == before


def test_what_does_not_fit_is_said_and_asked_about(place: Console) -> None:
    """A row that no memory holds: the plan has a result although `qhub plan` ends with 1."""
    folder = place.registry.home.root / FOLDER
    (folder / "large.toml").write_text(f"{RECIPE}packed_tokens = 16777216\n", encoding="utf-8")
    try:
        job = ended(place, ask(place, "/plans", {"recipe": "large.toml", "set": []}).json())
    finally:
        (folder / "large.toml").unlink()
    assert job["state"] == "done", job
    assert isinstance(job["result"]["fits"], bool)


def test_a_key_starts_what_it_may_see(place: Console) -> None:
    """An admin key for other names neither sees the recipe nor starts it."""
    keys = Keys(place.registry.home)
    key, other = keys.create(scopes=("admin",), adapters=("other*",))
    try:
        headers = {"Authorization": f"Bearer {other}"}
        assert httpx.get(f"{place.url}/v1/recipes", headers=headers).json()["data"] == []
        assert ask(place, "/runs", {"recipe": "sums.toml"}, other).status_code == 403
        assert ask(place, "/plans", {"recipe": "sums.toml"}, other).status_code == 403
    finally:
        keys.revoke(key.id)
