"""The console at 10,000 versions: server time and size of its pages, the first row in a browser, the time until
`qhub console` answers, and what an open page costs a busy server.

    python -m benchmarks.console [--versions 10000] [--names 3400] [--asked 15] [--seconds 6] [--rounds 3]

The home is a temporary one. Pages are asked for over one connection of the loopback; server time is from the request
to the last byte of its answer. The first row is looked for in chromium, where there is one, from the start of the
navigation; each time in a new context. The busy server answers eight completions at once on a small random base while
pages are asked for as `live.js` asks for them: that of a run of 50,000 lines that grows each second, that of the server
every two seconds. Budgets are those of this project: a list in 50 ms, an adapter in 100 ms, ready in 1.5 s.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from adapterhub_local.settings import environment_in
from adapterhub_local.settings import home as home_at
from benchmarks.machine import machine
from benchmarks.many_versions import many_versions

LIST, ADAPTER, READY = 50.0, 100.0, 1.5  # budgets: ms, ms, s
PAGES = {
    "/console": LIST,
    "/console?sort=exact_match": LIST,
    "/console?sort=exact_match&base=base-1": LIST,
    "/console?q=feels+short&base=base-1&metric=exact_match%3E0.5": LIST,
    "/console?task=sql": LIST,
    "/console?tag=tag-3": LIST,
    "/console?sort=created&versions=all": LIST,
    "/console/adapters/team/adapter-00007": ADAPTER,
    "/console/adapters/big": ADAPTER,
    "/console/bases": None,
    "/console/runs": None,
    "/console/runs/long-run": None,
}
STEPS = 50_000
ROWS = 8  # completions at once


@contextmanager
def started(home: Path, *command: str) -> Iterator[tuple[str, float]]:
    """A server of ours in this home: its address, and the seconds until it answered."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "adapterhub_local", *command, "--port", "0"], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=environment_in(home_at(home), None),
    )  # fmt: skip
    assert process.stdout is not None
    try:
        url = next(word for line in process.stdout for word in line.split() if word.startswith("http://"))
        address = url.removesuffix("/console").removesuffix("/v1").rstrip("/")
        httpx.get(f"{address}/console/login", trust_env=False, timeout=60)
        yield address, time.perf_counter() - begun
    finally:
        process.terminate()
        process.wait()


def make_run(home: Path) -> Path:
    """A run with a long log, as a training leaves it while it goes on."""
    folder = home / "runs" / "long-run"
    folder.mkdir(parents=True)
    record = {"status": "running", "name": "long", "steps": 10 * STEPS, "started_at": "2026-11-28T00:00:00Z"}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "log.jsonl").write_text("".join(line(step) for step in range(1, STEPS + 1)))
    return folder


def line(step: int) -> str:
    entry = {"step": step, "epoch": step / 1000, "loss": 3 / step, "grad_norm": 0.1, "learning_rate": 1e-4}
    return json.dumps(entry | {"seconds": step / 10}) + "\n"


@contextmanager
def growing(folder: Path) -> Iterator[None]:
    """The run goes on, ten steps a second."""
    from adapterhub_local.train.past_runs import holding

    done = threading.Event()

    def go_on() -> None:
        step = STEPS
        while not done.wait(0.1):
            step += 1
            with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(line(step))

    with holding(folder):
        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def pages(url: str, asked: int) -> list[dict[str, Any]]:
    """Server time and size of each page."""
    found = []
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        for path, budget in PAGES.items():
            times = []
            for _ in range(asked):
                begun = time.perf_counter()
                answer = client.get(path)
                times.append(1000 * (time.perf_counter() - begun))
                assert answer.status_code == 200, (path, answer.text)
            first, times = times[0], times[1:]
            figures = {"first_ms": first, "median_ms": statistics.median(times), "min_ms": min(times)}
            rounded = {name: round(value, 1) for name, value in figures.items()}
            found.append({"page": path, **rounded, "bytes": len(answer.content), "budget_ms": budget})
    return found


def first_row(url: str, times: int = 5) -> list[float] | None:
    """Milliseconds from the start of a navigation until chromium has the first row, None where there is none."""
    names = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    browser_path = next((found for found in names if found), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if browser_path is None:
        return None
    script = """new MutationObserver((_, observer) => {
        if (document.querySelector('tbody tr')) { window.firstRow = performance.now(); observer.disconnect(); }
    }).observe(document, {childList: true, subtree: true})"""
    found = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for _ in range(times + 1):
            context = browser.new_context()
            page = context.new_page()
            page.add_init_script(script)
            page.goto(f"{url}/console")
            found.append(round(page.evaluate("window.firstRow"), 1))
            context.close()
        browser.close()
    return found[1:]  # the first of all is the browser's own start


def busy(url: str, seconds: float, look: Callable[[httpx.Client], Any] | None, every: float) -> float:
    """Tokens a second of a server that is asked by eight at once, while a page is asked for every few seconds."""
    end = time.perf_counter() + seconds
    counts = [0] * ROWS

    def ask(row: int) -> None:
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            body = {"model": "bench", "prompt": f"row {row}", "max_tokens": 24, "temperature": 1, "seed": row}
            while time.perf_counter() < end:
                counts[row] += client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"]

    begun = time.perf_counter()
    threads = [threading.Thread(target=ask, args=(row,)) for row in range(ROWS)]
    for thread in threads:
        thread.start()
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        while look is not None and time.perf_counter() < end:
            look(client)
            time.sleep(every)
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begun)


def costs(home: Path, seconds: float, rounds: int) -> dict[str, Any]:
    """Tokens a second without a page, with a run's page and with the server's, by turns."""
    from adapterhub_local.base.add import add_base
    from tests.tiny import save_tiny_model

    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    with tempfile.TemporaryDirectory() as folder:
        add_base("bench", save_tiny_model(Path(folder) / "model", **shape), home_at(home))
    kinds: dict[str, tuple[Callable[[httpx.Client], Any] | None, float]] = {
        "none": (None, 1),
        "run": (lambda client: client.get("/console/runs/long-run"), 1),
        "server": (lambda client: client.get("/console/server"), 2),
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    with started(home, "serve", "--base", "bench", "--no-access-log") as (url, _), growing(home / "runs" / "long-run"):
        for look, every in kinds.values():  # not counted: threads start, the log is read for the first time
            busy(url, 1, look, every)
        for _ in range(rounds):
            for kind, (look, every) in kinds.items():
                found[kind].append(round(busy(url, seconds, look, every), 1))
    return {
        kind: {"tokens_per_second": statistics.median(each), "rounds": each,
               "share": round(statistics.median(each) / statistics.median(found["none"]), 3)}
        for kind, each in found.items()
    }  # fmt: skip


def table(result: dict[str, Any]) -> Iterator[str]:
    """The result as Markdown."""
    yield "| page | server time, median (min), ms | budget, ms | kB |"
    yield "| --- | --- | --- | --- |"
    for one in result["pages"]:
        budget = one["budget_ms"]
        verdict = "" if budget is None else f"{budget:g}" + (", **missed**" if one["median_ms"] > budget else "")
        yield f"| `{one['page']}` | {one['median_ms']} ({one['min_ms']}) | {verdict} | {one['bytes'] / 1000:.1f} |"
    yield ""
    ready, row = result["ready_seconds"], result["first_row_ms"]
    yield f"`qhub console` answers after {statistics.median(ready):.2f} s (median of {len(ready)}; budget {READY})."
    yield f"First row in chromium: {statistics.median(row):.0f} ms." if row else "There is no chromium here."
    yield ""
    yield "| open page | tokens/s of a busy server | share |"
    yield "| --- | --- | --- |"
    for kind, one in result["busy"].items():
        yield f"| {kind} | {one['tokens_per_second']} | {one['share']:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--names", type=int, default=3_400)
    parser.add_argument("--asked", type=int, default=15, help="times that each page is asked for")
    parser.add_argument("--seconds", type=float, default=6, help="of each round of the busy server")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        many_versions(home, options.versions, options.names)
        make_run(home)
        ready = []
        for _ in range(5):
            with started(home, "console") as (_, seconds):
                ready.append(round(seconds, 2))
        with started(home, "console") as (url, _):
            measured, row = pages(url, options.asked), first_row(url)
        result = {
            "machine": machine(), "versions": options.versions, "names": options.names, "pages": measured,
            "ready_seconds": ready, "first_row_ms": row, "busy": costs(home, options.seconds, options.rounds),
        }  # fmt: skip
    print("\n".join(table(result)))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
