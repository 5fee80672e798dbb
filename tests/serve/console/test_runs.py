"""Runs on their pages: a real training grows, is stopped, resumed and killed before a browser; and over HTTP."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.train.past_runs import LOG, RECORD, STOP, Newest, holding, list_runs, read_log
from serve.registry_api.run_log import MAX_POINTS, RunLogs, Thinned, log_from
from tests.chats import write_recipe
from tests.patience import PATIENCE
from tests.serve.console.conftest import Console
from tests.serve.console.test_pages import Look

LONG = ("--set", "train.epochs=5000", "--set", "train.learning_rate=1e-4", "--set", "train.save_every=50")
WAIT = 1000 * PATIENCE


@pytest.fixture
def own(home: Home) -> Iterator[Console]:
    """A console over this test's home."""
    running = Console(Registry(home))
    yield running
    running.stop()


def until(holds: Callable[[], Any]) -> Any:
    """What `holds` gives as soon as it is something."""
    deadline = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def step_of(page: Any) -> int:
    return int(re.findall(r"(\d+) of", page.locator("dt:text-is('Step') + dd").inner_text())[0])


def grown(page: Any, beyond: int) -> int:
    """The step that the page shows once it is beyond another."""
    page.wait_for_function("step => parseInt(document.querySelector('.facts dd').textContent) > step", arg=beyond,
                           timeout=WAIT)  # fmt: skip
    return step_of(page)


def says(page: Any, status: str) -> None:
    """Wait until the page says how the run goes, without being loaded again."""
    page.locator("#live [role=status] b", has_text=re.compile(f"^{status}$")).wait_for(timeout=WAIT)
    assert page.evaluate("window.isSame") is True


def test_a_run_before_a_browser(tiny_base: BaseInfo, home: Home, own: Console, look: Look, tmp_path: Path) -> None:
    """Its curve grows without a reload, whole for who comes later; it stops, goes on and crashes before one's eyes."""
    command = [sys.executable, "-m", "adapterhub_local", "train", str(write_recipe(tmp_path)), *LONG]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            run = until(lambda: [one for one in list_runs(home) if read_log(one.folder)])[0]
            page = look(f"{own.url}/console/runs/{run.id}")
            page.evaluate("window.isSame = true")
            says(page, "running")
            points = "document.querySelector('#live svg.curve polyline').points.numberOfItems"
            first, drawn = step_of(page), page.evaluate(points)
            assert grown(page, first) > first
            assert page.evaluate(points) > drawn
            page.close()

            page = look(f"{own.url}/console/runs/{run.id}")
            assert page.evaluate(points) >= min(first, MAX_POINTS)
            page.evaluate("window.isSame = true")
            stop = page.get_by_role("button", name="Stop after this step")
            stop.focus()
            grown(page, step_of(page))  # though the focus is in the part that changes
            assert page.evaluate("document.activeElement.textContent") == "Stop after this step"
            assert page.evaluate("window.isSame") is True
            page.keyboard.press("Enter")
            page.get_by_text("asked to stop after this step").or_(page.get_by_text("stopped")).first.wait_for()
            page.evaluate("window.isSame = true")
            says(page, "stopped")
            assert process.wait(PATIENCE) == 130
        finally:
            process.kill()
    stopped_at = step_of(page)

    page.get_by_role("button", name="Resume").click()
    page.wait_for_url(re.compile("job="))
    page.evaluate("window.isSame = true")
    says(page, "running")
    assert grown(page, stopped_at) > stopped_at
    os.kill(list_runs(home)[0].record["pid"], signal.SIGKILL)
    says(page, "crashed")

    (tmp_path / "train.jsonl").unlink()
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("alert").wait_for(timeout=WAIT)
    assert "It could not be resumed:" in page.get_by_role("alert").inner_text()
    assert "train.jsonl" in page.get_by_role("alert").inner_text()
    assert page.get_by_role("button", name="Resume").is_visible()


def made(home: Home, name: str, started: str, lines: int, **more: Any) -> Path:
    """The folder of a run as a training leaves it."""
    folder = home.runs / f"{name}-run"
    folder.mkdir(parents=True)
    record = {"status": "running", "name": name, "started_at": started, "steps": 100, **more}
    (folder / RECORD).write_text(json.dumps(record))
    (folder / LOG).write_text("".join(line(step) for step in range(1, lines + 1)))
    return folder


def line(step: int) -> str:
    """A line of a log."""
    return json.dumps({"step": step, "loss": 1 / step, "seconds": step, "learning_rate": 0.1}) + "\n"


@pytest.fixture
def ask(own: Console) -> Iterator[httpx.Client]:
    """A client of it."""
    with httpx.Client(base_url=f"{own.url}/v1", trust_env=False, timeout=PATIENCE) as client:
        yield client


def test_a_log_is_read_on_over_http(home: Home, ask: httpx.Client) -> None:
    """Each whole line is given once, half a line when it is whole, and a log that was begun again from its start."""
    folder = made(home, "a", "2026-01-01T00:00:00Z", 3)
    answer = ask.get("/runs/a-run").json()
    assert ([entry["step"] for entry in answer["log"]], answer["next"]) == ([1, 2, 3], (folder / LOG).stat().st_size)
    assert ask.get("/runs/a-run", params={"offset": answer["next"]}).json()["log"] == []
    with open(folder / LOG, "a") as log:
        log.write(line(4) + "[not an entry]\n" + line(5)[:10])
    more = ask.get("/runs/a-run", params={"offset": answer["next"]}).json()
    assert [entry["step"] for entry in more["log"]] == [4]
    assert more["step"] == 4
    with open(folder / LOG, "a") as log:
        log.write(line(5)[10:])
    last = ask.get("/runs/a-run", params={"offset": more["next"]}).json()
    assert [entry["step"] for entry in last["log"]] == [5]
    (folder / LOG).write_text(line(1))
    assert [entry["step"] for entry in ask.get("/runs/a-run", params={"offset": last["next"]}).json()["log"]] == [1]
    assert log_from(home.runs / "none", 5, 100) == ([], 0)
    assert log_from(folder, 0, 10) == ([], 0)


@pytest.mark.parametrize("offset", ["-1", "x", ""])
def test_an_offset_that_is_none(home: Home, ask: httpx.Client, offset: str) -> None:
    """What is no place in a file is refused."""
    made(home, "a", "2026-01-01T00:00:00Z", 1)
    assert ask.get("/runs/a-run", params={"offset": offset}).status_code == 400


def test_stop_over_http(home: Home, ask: httpx.Client) -> None:
    """A run that somebody trains is asked to stop; one that nobody trains is not, and one that is not there is none."""
    folder = made(home, "a", "2026-01-01T00:00:00Z", 3)
    answer = ask.post("/runs/a-run/stop")
    assert (answer.status_code, "it is crashed" in answer.text) == (400, True)
    assert not (folder / STOP).exists()
    with holding(folder):
        answer = ask.post("/runs/a-run/stop")
    assert (answer.status_code, answer.json()["stop_asked"], answer.json()["status"]) == (200, True, "running")
    assert (folder / STOP).exists()
    for name in ("b-run", "..", "%2e%2e", "a-run%2f..%2fa-run", "a-run%00", "x" * 300):
        assert ask.post(f"/runs/{name}/stop").status_code == 404


def test_runs_come_in_pages(home: Home, ask: httpx.Client) -> None:
    """The newest first, each once, with how many there are; a key for some names sees theirs alone."""
    for number in range(7):
        made(home, f"n{number}", f"2026-01-0{1 + number // 2}T00:00:00Z", number)
    walked: list[str] = []
    after = None
    while True:
        found = ask.get("/runs", params={"limit": 3, **({"after": after} if after else {})}).json()
        assert found["total"] == (7 if not walked else 8)
        walked += [run["name"] for run in found["data"]]
        if (after := found["after"]) is None:
            break
        if len(walked) == 3:
            made(home, "late", "2026-02-01T00:00:00Z", 1)  # stands before all pages that are still to come
    assert walked == [f"n{number}" for number in range(6, -1, -1)]
    for wrong in ({"limit": 0}, {"limit": 201}, {"after": "nonsense"}, {"after": "W10"}):
        assert ask.get("/runs", params=wrong).status_code == 400
    _, reader = Keys(home).create(adapters=("n1",), scopes=("admin",))
    found = ask.get("/runs", headers={"Authorization": f"Bearer {reader}"}).json()
    assert ([run["name"] for run in found["data"]], found["total"]) == (["n1"], 1)


def test_what_is_followed_is_what_is_there(home: Home) -> None:
    """After every change of a log its figures and its curve are those of the whole file, read at once."""
    folder, logs = made(home, "a", "2026", 0), RunLogs()

    def check() -> None:
        entries = read_log(folder)
        assert logs.newest(folder) == logs.curves(folder).newest == Newest.of(entries)
        curve = logs.curves(folder).curves["loss"].points()
        expected = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
        assert curve == expected if len(expected) <= 2 * MAX_POINTS else set(curve) < set(expected)
        assert curve[-1:] == expected[-1:]
        assert len(curve) <= 2 * MAX_POINTS + 1

    check()
    for step in range(1, 2500):
        with open(folder / LOG, "a") as log:
            log.write(line(step))
            log.write(json.dumps({"step": step, "eval_loss": 2 / step}) + "\n" if step % 7 == 0 else "")
        if step % 100 == 3:
            check()
    assert list(logs.curves(folder).timed) == [entry for entry in read_log(folder) if "seconds" in entry][-20:]
    (folder / LOG).write_text(line(1) + line(2))  # in its place, and shorter
    check()
    (folder / LOG).write_text("".join(line(step) for step in range(1, 40)))
    check()
    (folder / LOG).write_text("".join(line(step + 50) for step in range(1, 60)))  # in its place, and longer
    check()
    (folder / "new").write_text("".join(line(step) for step in range(1, 200)))
    os.replace(folder / "new", folder / LOG)  # as a run that is resumed does
    check()
    (folder / LOG).unlink()
    check()


def test_a_curve_takes_numbers_only() -> None:
    """Whatever else a log says, there is a curve to draw, or none."""
    curve = Thinned()
    for x, y in ((1, "2"), (None, 1), (2, None), ([], {})):
        curve.add(x, y)
    assert curve.points() == []
    curve.add(3, 1)
    assert curve.points() == [(3, 1.0)]
