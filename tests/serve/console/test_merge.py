"""The merge workbench before a browser: what it shows is what `qhub merge` prints, and what is filled in stays."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.merge.methods import METHODS
from adapterhub_local.registry import Registry
from serve.console.rank_curve import by_rank
from tests.patience import PATIENCE
from tests.serve.console.conftest import Console, fill
from tests.serve.console.test_pages import Look

WAIT = 1000 * PATIENCE
WRONG = {  # fields -> the message
    (("m", "nobody"), ("w", "1")): "there is no adapter 'nobody'",
    (("m", "sentiment@2"), ("w", "much")): "'much' is not a weight",
    (("m", "sentiment@2"), ("w", "nan")): "'nan' is not a weight",
    (("m", "sentiment@2"), ("w", "1"), ("rank", "few")): "rank is 'few': it must be a whole number",
    (("m", "sentiment@2"), ("w", "1"), ("rank", "0")): "rank: Input should be greater than or equal to 1",
    (("m", "sentiment@2"), ("w", "1"), ("rank", "4"), ("energy", "0.5")): "rank and energy exclude each other",
    (("m", "sentiment@2"), ("w", "1"), ("max_error", "2")): "max error: Input should be less than 1",
    (("m", "sentiment@2"), ("w", "1"), ("density", "0.5")): "weighted_sum has no parameter 'density'",
    (("m", "sentiment@2"), ("w", "1"), ("method", "ties"), ("density", "3")): "density is 3: give a number above 0",
    (("m", "sentiment@2"), ("w", "1"), ("method", "ties"), ("variant", "x")): "use mergekit or peft",
    (("m", "sentiment@2"), ("w", "1"), ("method", "dare_ties"), ("seed", "9" * 400)): "parameters.seed",
    (("m", "sentiment@2"), ("w", "1"), ("method", "slerp")): "slerp is between two adapters, not 1",
    (("m", "sentiment@2"), ("w", "1"), ("method", "none")): "there is no merge method 'none'",
    (("m", "sentiment@2"), ("w", "1"), ("name", "a/../b")): "a/../b",
    (("m", ""), ("w", "1")): "choose the adapters to merge",
}


@pytest.fixture(scope="module")
def own(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """A console whose adapters may be merged."""
    registry = Registry(tmp_path_factory.mktemp("merged"))
    shutil.copytree(built_base, registry.home.bases / "tiny")
    fill(registry, read_record(built_base))
    running = Console(registry)
    yield running
    running.stop()


def printed(console: Console, *words: str) -> dict[str, Any]:
    """What `qhub merge --dry-run --json` prints there."""
    command = [sys.executable, "-m", "adapterhub_local", "merge", *words, "--dry-run", "--json"]
    environment = {"QHUB_HOME": str(console.registry.home.root), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_preview_and_merge(own: Console, look: Look) -> None:
    """Three adapters by a method with a parameter, cut in rank: the error is that of the command line to 1e-6; the
    merge is made, and its page opens."""
    page = look(f"{own.url}/console/merge")
    page.get_by_label("Adapter").first.fill("sentiment@2")
    page.get_by_label("Weight").first.fill("0.6")
    page.get_by_role("button", name="Add an adapter").click()
    page.wait_for_url(re.compile("more="))
    assert page.get_by_label("Adapter").count() == 3
    assert page.get_by_label("Adapter").first.input_value() == "sentiment@2"
    for row, (name, weight) in enumerate((("origin@1", "0.3"), ("tone@1", "-0.1")), 1):
        page.get_by_label("Adapter").nth(row).fill(name)
        page.get_by_label("Weight").nth(row).fill(weight)
    page.get_by_label("Method").first.select_option("ties")
    page.get_by_label("Rank").fill("3")
    page.get_by_text("Parameters of the method").click()
    page.get_by_label("Density").fill("0.4")
    page.get_by_role("button", name="See what it loses").click()
    page.locator("#error").wait_for(timeout=WAIT)
    report = printed(own, "sentiment@2", "origin@1", "tone@1", "--weights=0.6,0.3,-0.1", "--method=ties",
                     "--density=0.4", "--rank=3")  # fmt: skip
    assert float(page.locator("#error").get_attribute("data-value")) == pytest.approx(
        report["relative_error"], abs=1e-6
    )
    assert page.locator("#error").inner_text() == f"{100 * report['relative_error']:.2f} %"
    assert page.get_by_label("Density").input_value() == "0.4"  # what was asked is still there

    page.get_by_label("Name", exact=True).fill("three")
    page.get_by_label("Alias").fill("prod")
    page.get_by_role("button", name="Merge", exact=True).click()
    page.get_by_role("link", name="three@1").wait_for(timeout=WAIT)
    page.get_by_role("link", name="three@1").click()
    page.wait_for_url(re.compile("/console/adapters/three"))
    lineage = own.registry.resolve("three@prod").lineage
    assert page.locator("h1").inner_text().startswith("three")
    assert lineage["merge"]["parameters"]["density"] == 0.4
    assert [parent["weight"] for parent in lineage["parents"]] == [0.6, 0.3, -0.1]


def test_two_adapters_have_a_map_with_a_legend(own: Console, look: Look) -> None:
    """The cosines of a merge of two are squares, and what their colours mean is written below."""
    page = look(f"{own.url}/console/merge")
    for row, name in enumerate(("sentiment@2", "origin@1")):
        page.get_by_label("Adapter").nth(row).fill(name)
    page.get_by_role("button", name="See what it loses").click()
    page.locator("svg.heat").wait_for(timeout=WAIT)
    words = page.locator("svg.heat text").all_text_contents()
    assert words[-7:] == ["cosine", "-1", "opposite", "0", "unrelated", "1", "same"]


@pytest.mark.parametrize("fields", WRONG, ids=lambda fields: "-".join("=".join(pair)[:30] for pair in fields))
def test_a_mistake_leaves_the_form(own: Console, fields: tuple[tuple[str, str], ...]) -> None:
    """What cannot be merged is said above the form, in which all stands as it was filled in; no job was started."""
    with httpx.Client(base_url=own.url, trust_env=False, timeout=PATIENCE) as client:
        data: dict[str, Any] = {}
        for name, value in fields:
            data.setdefault(name, []).append(value)
        jobs = len(client.get("/v1/jobs").json()["data"])
        answer = client.post("/console/merge", data=data)
        assert answer.status_code in (400, 404)
        assert WRONG[fields].replace("'", "&#39;") in answer.text
        assert 'action="/console/merge"' in answer.text
        for name, value in fields:
            if name in ("m", "w", "rank", "energy", "max_error", "density", "seed") and value != "":
                assert f'name="{name}" value="{value}"' in answer.text or (name == "w" and not data["m"][0])
        assert len(client.get("/v1/jobs").json()["data"]) == jobs


def test_a_job_that_fails_is_told_beside_the_form(own: Console, look: Look) -> None:
    """What only the merge itself finds out, such as an alias that is protected, stands on the same page."""
    with httpx.Client(base_url=own.url, trust_env=False, timeout=PATIENCE) as client:
        body = {"alias": "prod", "require": [], "approvals": 1}
        assert client.put("/v1/registry/protections/sentiment", json=body).status_code == 200
        answer = client.post("/console/merge", data={"m": "tone@1", "w": "1", "name": "sentiment", "alias": "prod"})
        assert answer.status_code == 303
    page = look(own.url + answer.headers["location"])
    page.get_by_role("alert").wait_for(timeout=WAIT)
    assert "sentiment@prod" in page.get_by_role("alert").inner_text()
    assert page.get_by_label("Adapter").first.input_value() == "tone@1"
    assert own.registry.resolve("sentiment").number == 2


def test_every_method_is_offered(own: Console) -> None:
    """All that the command line has, and a job that the server has forgotten leaves the form."""
    with httpx.Client(base_url=own.url, trust_env=False, timeout=PATIENCE) as client:
        answer = client.get("/console/merge", params={"m": "tone@1", "w": "2", "job": "gone", "method": "knots"})
        assert answer.status_code == 200
        assert re.findall(r"<option[^>]*>(\w+)</option>", answer.text)[: len(METHODS)] == list(METHODS)
        assert "there is no such job" in answer.text
        assert 'name="m" value="tone@1"' in answer.text


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ('"parameters": {"density": 0.5}', "weighted_sum has no parameter 'density'"),
        ('"method": "ties", "parameters": {"density": NaN}', "density is nan"),
        ('"method": "ties", "parameters": {"density": 1e999}', "density is inf"),
        ('"method": "ties", "parameters": {"density": true}', "parameters"),
        ('"method": "ties", "parameters": {"variant": "--force"}', "parameters"),
        ('"method": "ties", "parameters": {"--force": 1}', "parameters"),
        ('"method": "dare_ties", "parameters": {"seed": 1.5}', "seed is 1.5: give a finite whole number"),
        (f'"method": "dare_ties", "parameters": {{"seed": 1{"0" * 400}}}', "parameters"),
        ('"rank": 3, "max_error": 0.1', "rank and max_error exclude each other"),
        ('"energy": 0', "energy"),
        ('"max_error": 1', "max_error"),
        ('"parameters": []', "parameters"),
        ('"methods": "ties"', "methods"),
    ],
)  # fmt: skip
def test_what_programs_ask_is_checked_before_a_job_starts(own: Console, more: str, reason: str) -> None:
    """A parameter that the method has not, or that cannot be, is a 400 that names it."""
    with httpx.Client(base_url=own.url, trust_env=False, timeout=PATIENCE) as client:
        jobs = len(client.get("/v1/jobs").json()["data"])
        body = f'{{"adapters": ["tone@1"], "weights": [1], {more}}}'
        answer = client.post("/v1/merges", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert reason in answer.text
        assert len(client.get("/v1/jobs").json()["data"]) == jobs


def test_the_error_against_rank_is_drawn_before_a_rank_is_chosen(own: Console, look: Look) -> None:
    """Curve and table have what `qhub merge` loses at that rank; the rank that is asked for is marked in both."""
    form = {"m": ["sentiment@2", "origin@1"], "w": ["0.6", "0.4"], "rank": "3"}
    with httpx.Client(base_url=own.url, trust_env=False, timeout=PATIENCE) as client:
        page = look(own.url + client.post("/console/merge", data=form).headers["location"])
    words = ("sentiment@2", "origin@1", "--weights=0.6,0.4")
    losses = [printed(own, *words, f"--rank={rank}")["relative_error"] for rank in (1, 3)]
    picture = page.get_by_role("img", name=re.compile("Error against rank"))
    picture.wait_for(timeout=WAIT)
    text = picture.get_attribute("aria-label")
    assert f"{100 * losses[0]:.2f} % at rank 1, " in text
    assert text.endswith(f"; {100 * losses[1]:.2f} % at rank 3, as asked")
    page.get_by_text("As a table").click()
    rows = page.locator("figure + details tbody tr").all_inner_texts()
    assert rows[0].split() == ["1", f"{100 * losses[0]:.2f}", "%", f"{100 * (1 - losses[0] ** 2):.2f}", "%"]
    assert rows[2].startswith("3 (as asked)")
    assert rows[-1].split()[1] == "0.00"


def test_a_merge_of_the_most_there_may_be_stays_small() -> None:
    """With thousands of ranks the curve has a few hundred points and the table forty rows, both ends among them."""
    errors = [1 - index / 9999 for index in range(10_000)]
    report = {"error_by_rank": errors, "rank": 77, "dtype": "bfloat16", "rounding_error": 0.0021}
    found = by_rank(report, 1.0)
    assert found is not None
    assert len(str(found["picture"])) < 8000
    ranks = [row["rank"] for row in found["rows"]]
    assert (ranks[0], ranks[-1], 77 in ranks, len(ranks) <= 41) == (1, 10_000, True, True)
    assert "bfloat16 adds up to 0.21 %" in found["rounding"]
    assert len(str((by_rank(report, 0.05) or {})["picture"])) < 3000
    for wrong in (None, [], "x", [1.0, "x"], [float("nan")], [None]):
        assert by_rank({"error_by_rank": wrong, "rank": 1}, 1.0) is None
