"""Pages of what jobs found, however much that is and whatever it says: small, and all of it shown as text."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from adapterhub_local.registry import Registry
from serve.console.budget import BYTES, NODES, size_of
from serve.jobs import Job
from tests.patience import PATIENCE
from tests.serve.console.conftest import Console
from tests.serve.console.hostile import TEXT, UNSEEN

LONG = (TEXT.replace("\ud800", "") + "ש " * 3000)[:4000]
SCORES = {"exact_match": 0.5, "loss": 1.25, "rows": 20, "intervals": {"exact_match": [0.3, 0.7], "loss": [1.0, 1.5]}}


def methods(text: str) -> dict[str, Any]:
    """What `qhub try-merges` prints of the most that it takes, with a text wherever one may stand."""
    return {
        "task": text, "recipe": text, "data": None, "known_to": [text] * 16, "rows": 20, "rows_held_out": 10**6,
        "columns": [{"name": text, "rank": 4, "relative_error": 0.1, "scores": SCORES} for _ in range(5)],
        "examples": [{"prompt": text, "wanted": text, "answers": [{"text": text, "is_exact": False}] * 5}] * 20,
    }  # fmt: skip


def merge(text: str) -> dict[str, Any]:
    """What `qhub merge --dry-run --by-rank` prints of the most that it takes."""
    pairs = [{"pair": [text, text], "cosine": cosine / 120} for cosine in range(120)]
    modules = [{"module": text, "relative_error": 0.5, "cosine": [0.1] * 120}] * 400
    curve = [1 - index / 8192 for index in range(8192)]
    return {"rank": 77, "exact_rank": 8192, "relative_error": 0.5, "retained_energy": 0.75, "kept": 0.7,
            "dtype": "bfloat16", "rounding_error": 0.01, "notes": [], "interference": pairs, "modules": modules,
            "error_by_rank": curve}  # fmt: skip


JOBS = {
    "methods": ("/console/merge/methods?m=a&w=1&f=ties&job=one", "methods", methods),
    "merge": ("/console/merge?m=a&w=1&m=b&w=1&m=c&w=1&job=one", "preview", merge),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    running = Console(Registry(tmp_path_factory.mktemp("jobs")))
    yield running
    running.stop()


@pytest.mark.parametrize("kind", JOBS)
@pytest.mark.parametrize("text", ["short", "W" * 4000, LONG], ids=["short", "long", "hostile"])
def test_what_a_job_found_fits_and_is_text(place: Console, kind: str, text: str) -> None:
    """At most 60 kB and 1,500 elements, nothing that turns letters round, no element that a text brought."""
    path, of, make = JOBS[kind]
    place.app.state.library.jobs._jobs["one"] = Job("one", of, ("merge",), state="done", seconds=1.0, result=make(text))
    page = httpx.get(place.url + path, timeout=PATIENCE, trust_env=False)
    assert page.status_code == 200
    size, nodes = size_of(page.content)
    assert size <= BYTES
    assert nodes <= NODES
    assert not [letter for letter in UNSEEN if letter in page.text]
    assert "<img" not in page.text
    assert "<b>{{" not in page.text


@pytest.mark.parametrize("kind", JOBS)
@pytest.mark.parametrize(
    "result",
    [None, [], "text", {}, {"columns": None, "examples": None}, {"error_by_rank": {}, "interference": None}, 7],
    ids=str,
)
def test_a_result_of_another_shape_is_no_error_of_ours(place: Console, kind: str, result: Any) -> None:
    """What a job of an older or a newer qhub printed leaves the page and its form."""
    path, of, _ = JOBS[kind]
    place.app.state.library.jobs._jobs["one"] = Job("one", of, ("merge",), state="done", seconds=1.0, result=result)
    page = httpx.get(place.url + path, timeout=PATIENCE, trust_env=False)
    assert page.status_code == 200
    assert "<form" in page.text


@pytest.mark.parametrize("kind", JOBS)
def test_a_job_about_something_else_is_refused_beside_the_form(place: Console, kind: str) -> None:
    """An address that was put together of two pages says so and keeps the form."""
    path, _, _ = JOBS[kind]
    place.app.state.library.jobs._jobs["one"] = Job("one", "diff", ("diff",), state="done", seconds=1.0)
    page = httpx.get(place.url + path, timeout=PATIENCE, trust_env=False)
    assert "that job is about something else" in page.text
    assert 'name="m" value="a"' in page.text
