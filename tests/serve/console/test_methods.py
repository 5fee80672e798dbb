"""Methods side by side before a browser, and jobs that are cancelled: nothing is registered, whatever comes of it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from serve.registry_api.starting import FOLDER
from tests.patience import PATIENCE
from tests.recipes import MINIMAL
from tests.serve.console.conftest import Console, fill
from tests.serve.console.hostile import TEXT
from tests.serve.console.test_pages import Look
from tests.serve.console.test_starting import ended

WAIT = 1000 * PATIENCE
PAGE = "/console/merge/methods"
ROWS = [{"prompt": f"{number}? <b>&", "completion": f" {2 * number}."} for number in range(6)]
ASKED = {"m": ["sentiment@2", "origin@1"], "w": ["0.6", "0.4"], "f": ["weighted_sum", "ties density=0.3 rank=2"],
         "data": "recipe:sums.toml", "examples": "3"}  # fmt: skip
WRONG = {
    "no adapter": ({"m": ["", ""]}, "choose the adapters"),
    "no method": ({"f": ["", " "]}, "write the methods to compare"),
    "no such method": ({"f": ["tie"]}, "did you mean ties"),
    "a setting of another": ({"f": ["weighted_sum density=0.5"]}, "weighted_sum has no parameter 'density'"),
    "out of bounds": ({"f": ["ties density=7"]}, "density is 7"),
    "twice": ({"f": ["ties", "ties "]}, "two of the methods are the same"),
    "too many": ({"f": [f"weighted_sum rank={rank}" for rank in range(1, 6)]}, "methods"),
    "hostile": ({"f": [TEXT.replace("\x00", "").replace("\ud800", "")]}, "there is no merge method"),
    "no data": ({"data": ""}, "choose the recipe or the run"),
    "no such recipe": ({"data": "recipe:../sums.toml"}, "there is no recipe"),
    "no such run": ({"data": "run:x"}, "there is no run"),
    "no number": ({"examples": "many"}, "it must be a whole number"),
    "too many examples": ({"examples": "21"}, "examples"),
    "no such adapter": ({"m": ["nobody", "origin@1"]}, "there is no adapter"),
    "no weight": ({"w": ["x", "1"]}, "is not a weight"),
}


@pytest.fixture(scope="module")
def own(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """A console beside a base, with adapters and a recipe with held-out data."""
    registry = Registry(tmp_path_factory.mktemp("methods"))
    shutil.copytree(built_base, registry.home.bases / "tiny")
    fill(registry, read_record(built_base))
    folder = registry.home.root / FOLDER
    folder.mkdir()
    text = MINIMAL.replace('"train.jsonl"', '"train.jsonl"\ntest = "test.jsonl"')
    (folder / "sums.toml").write_text(text, encoding="utf-8")
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), encoding="utf-8")
    running = Console(registry)
    yield running
    running.stop()


def client(console: Console, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=console.url, trust_env=False, timeout=PATIENCE, **options)


def test_from_the_workbench_to_the_answers(own: Console, look: Look) -> None:
    """The workbench's adapters and method come along; the table has the scores and answers that the command prints."""
    page = look(f"{own.url}/console/merge", viewport={"width": 390, "height": 800})
    for row, (name, weight) in enumerate((("sentiment@2", "0.6"), ("origin@1", "0.4"))):
        page.get_by_label("Adapter").nth(row).fill(name)
        page.get_by_label("Weight").nth(row).fill(weight)
    page.get_by_label("Method").first.select_option("ties")
    page.get_by_label("Rank").fill("2")
    page.get_by_role("button", name="Methods side by side").click()
    page.wait_for_url(re.compile(PAGE))
    assert page.get_by_label("Method 1").input_value() == "ties rank=2"
    assert page.get_by_label("Adapter").nth(1).input_value() == "origin@1"
    page.get_by_label("Method 2").fill("weighted_sum")
    page.get_by_label("How many").fill("2")
    page.get_by_role("button", name="Ask them").click()
    page.get_by_role("heading", name="Answer by answer").wait_for(timeout=WAIT)
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    words = ["try-merges", "sentiment@2", "origin@1", "--weights=0.6,0.4", "--method=ties rank=2"]
    words += ["--method=weighted_sum", f"--recipe={own.registry.home.root / FOLDER / 'sums.toml'}", "--limit=2"]
    done = subprocess.run(
        [sys.executable, "-m", "adapterhub_local", *words, "--json"], capture_output=True, text=True, check=True,
        timeout=PATIENCE, env={"QHUB_HOME": str(own.registry.home.root), "PATH": "/usr/bin:/bin", "PYTHONPATH": "."},
    )  # fmt: skip
    expected = json.loads(done.stdout)
    rows = page.locator("table").first.locator("tbody tr")
    for index, column in enumerate(expected["columns"]):
        cells = rows.nth(index).locator("th, td").all_inner_texts()
        assert cells[0].startswith(column["name"])
        assert f"{column['scores']['loss']:.4f}" in cells[3]
    answers = page.locator("table.said tbody tr")
    assert answers.count() == 2
    assert "0? <b>&" in answers.first.locator("th").inner_text()
    assert page.locator("table.said b").count() == 0
    assert sorted(map(str, own.registry.versions())) == ["both@1", "origin@1", "sentiment@1", "sentiment@2", "tone@1"]


@pytest.mark.parametrize("kind", WRONG)
def test_a_mistake_leaves_the_form(own: Console, kind: str) -> None:
    """A form that cannot be used comes back as it was filled in, with the reason above it; no job is started."""
    change, reason = WRONG[kind]
    with client(own) as browser:
        jobs = len(browser.get("/v1/jobs").json()["data"])
        said = browser.post(PAGE, data={**ASKED, **change})
        assert said.status_code in (400, 404)
        assert 'role="alert"' in said.text
        assert reason.replace("'", "&#39;") in said.text
        assert f'action="{PAGE}"' in said.text
        assert "\u202e" not in re.sub(r'value="[^"]*"', "", said.text)
        assert len(browser.get("/v1/jobs").json()["data"]) == jobs


def test_without_base_or_data_the_page_says_how_to_get_them(registry: Registry, built_base: Path) -> None:
    """A console without recipes offers no button; without the base it names the command that adds one."""
    fill(registry, read_record(built_base))
    running = Console(registry)
    try:
        with client(running) as browser:
            page = browser.get(PAGE).text
            assert "There are no held-out examples to ask" in page
            assert "Ask them" not in page
            said = browser.post(PAGE, data=ASKED)
            assert said.status_code >= 400
            assert "add it with `qhub base add`" in said.text
    finally:
        running.stop()


@pytest.mark.parametrize("path", ["/v1/merges", "/v1/merges/methods"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ('"weights": [NaN, 1]', "weights"),
        ('"weights": [1e999, 1]', "weights"),
        ('"weights": [1]', "one weight for each adapter"),
        ('"adapters": [], "weights": []', "adapters"),
        ('"adapters": ["both", "nobody"]', "there is no adapter"),
        ('"adapters": ["both", "--force"]', "--force"),
        ('"more": 1', "more"),
    ],
)
def test_what_programs_ask_is_checked_before_a_job_starts(own: Console, path: str, change: str, reason: str) -> None:
    """A body that cannot be asked is refused with what is wrong with it, whichever of the two jobs it is for."""
    body = {"adapters": ["both", "tone"], "weights": [1, 1]}
    body |= {"methods": ["ties"], "recipe": "sums.toml"} if path.endswith("methods") else {}
    text = json.dumps(body)[:-1]
    for name in re.findall(r'"(\w+)": \[', change):
        text = re.sub(rf'"{name}": \[[^]]*\],? ?', "", text).rstrip(", ")
    text += (", " if text != "{" else "") + change + "}"
    with client(own) as browser:
        jobs = len(browser.get("/v1/jobs").json()["data"])
        said = browser.post(path, content=text, headers={"Content-Type": "application/json"})
        assert said.status_code in (400, 404), said.text
        assert reason in said.text
        assert len(browser.get("/v1/jobs").json()["data"]) == jobs


def test_a_job_is_cancelled_and_can_be_asked_again(own: Console) -> None:
    """It ends, says so on its page and over the API, keeps nothing, and the same question starts a new one."""
    with client(own) as browser:
        before = sorted(map(str, own.registry.versions()))
        where = browser.post(PAGE, data=ASKED).headers["location"]
        job = parse_qs(urlsplit(where).query)["job"][0]
        page = browser.get(where).text
        assert "Cancel it" in page
        assert parse_qs(urlsplit(browser.post(PAGE, data=ASKED).headers["location"]).query)["job"] == [job]
        said = browser.post(f"/v1/jobs/{job}/cancel").json()
        assert said["cancel_asked"]
        done = ended(own, said)
        assert (done["state"], done["error"]) == ("cancelled", "it was cancelled")
        assert "it was cancelled" in browser.get(where).text
        assert browser.post(f"/v1/jobs/{job}/cancel").status_code == 409
        assert browser.post("/console/jobs/cancel", data={"job": job}).headers["location"] == f"/console/jobs/{job}"
        again = parse_qs(urlsplit(browser.post(PAGE, data=ASKED).headers["location"]).query)["job"][0]
        assert again != job
        assert browser.post("/console/jobs/cancel", data={"job": again}).status_code == 303
        assert ended(own, browser.get(f"/v1/jobs/{again}").json())["state"] == "cancelled"
        assert sorted(map(str, own.registry.versions())) == before


def test_jobs_are_for_keys_of_all_their_adapters(built_base: Path, registry: Registry) -> None:
    """A key for some adapters neither sees nor ends a job about others, over the API or on a page."""
    fill(registry, read_record(built_base))
    running = Console(registry)
    keys = Keys(registry.home)
    every, some = (
        {"Authorization": f"Bearer {keys.create(scopes=('admin',), adapters=names)[1]}"} for names in ((), ("sent*",))
    )
    try:
        with client(running) as browser:
            body = {"left": "sentiment@1", "right": "origin@1"}
            job = browser.post("/v1/registry/compare/modules", json=body, headers=every).json()["id"]
            mine = browser.post(
                "/v1/registry/compare/modules", json={**body, "right": "sentiment@2"}, headers=some
            ).json()["id"]
            assert [one["id"] for one in browser.get("/v1/jobs", headers=some).json()["data"]] == [mine]
            assert len(browser.get("/v1/jobs", headers=every).json()["data"]) == 2
            for method, path in (("GET", f"/v1/jobs/{job}"), ("POST", f"/v1/jobs/{job}/cancel"),
                                 ("GET", f"/console/jobs/{job}")):  # fmt: skip
                refused = browser.request(method, path, headers=some)
                assert refused.status_code == 403
                assert "sentiment@1 origin@1" not in refused.text
            assert browser.post("/console/jobs/cancel", data={"job": job}, headers=some).status_code == 403
            assert job not in browser.get("/console/server", headers=some).text
            for identity, headers in ((job, every), (mine, some)):
                assert browser.post(f"/v1/jobs/{identity}/cancel", headers=headers).status_code == 200
    finally:
        running.stop()
