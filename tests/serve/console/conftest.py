"""The console in a real browser: Debian's chromium by Playwright; skipped with the reason where there is none."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from transformers import AutoConfig

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from adapterhub_local.registry.marks import add_tags, describe
from serve.http.console import console_app
from serve.listen import http_config
from serve.options import HttpOptions
from tests.serve.adapter_makers import llama_shapes, write_random
from tests.serve.conftest import Server

BROWSERS = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next((found for found in BROWSERS if found), None)
# names of other hosts that lead to this machine, as a page's owner can have it
SITE, REBOUND = "evil.example", "rebound.example"
NAMES = (
    f"--host-resolver-rules=MAP {SITE} 127.0.0.1, MAP {REBOUND} 127.0.0.1",
    "--disable-features=LocalNetworkAccessChecks",  # a question to the person, which not every browser asks
)
HOSTILE = "<img src=x onerror=alert(1)></script><b>\u202e{{ 7*7 }}"


class Console:
    """`qhub console`'s application, or another, on the loopback."""

    def __init__(self, registry: Registry, app: Any = None) -> None:
        self.registry = registry
        self.app = app or console_app(registry, HttpOptions())
        self.keys: dict[str, str] = {}
        self._server = uvicorn.Server(http_config(self.app, port=0))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)


def scored(share: float, base: float, rows: int = 200) -> dict[str, Any]:
    """Scores of a task with intervals, the base beside."""
    intervals = {"exact_match": [max(0.0, share - 0.05), min(1.0, share + 0.04)]}
    return {
        "adapter": {"exact_match": share, "loss": 1 - share, "rows": rows, "intervals": intervals},
        "base": {"exact_match": base, "loss": 1 - base, "rows": rows},
    }


def fill(registry: Registry, base: Any, *, is_hostile: bool = True) -> None:
    """Three adapters and a merge of two of them, with scores, a curve, samples, tags and a moved alias."""
    lineage = {
        "kind": "train", "base": base.lineage(), "task": "sentiment", "description": "says how a review feels",
        "adapter": {"rank": 8, "alpha": 16.0},
        "recipe": {"text": "[train]\nepochs = 2\n", "resolved": {"train": {"epochs": 2}}},
        "data": [{"role": "train", "file": "reviews.jsonl", "rows": 400, "digest": "sha256:" + "d" * 64}],
        "training": {
            "steps": 40, "curve": [[step, 3 / step] for step in range(1, 41)], "held_out": [[20, 0.9], [40, 0.4]]
        },
        "samples": [{"prompt": "The film was a joy.", "wanted": "positive", "base": "The film", "adapter": "positive"}],
    }  # fmt: skip
    made = []
    for seed, (name, share) in enumerate((("sentiment", 0.855), ("sentiment", 0.895), ("origin", 0.72), ("tone", 0.5))):
        entry = lineage if name == "sentiment" else {**lineage, "task": name, "description": f"about {name}"}
        entry = {**entry, "recipe": {"text": f"seed = {seed}", "resolved": {"train": {"epochs": seed + 1}}}}
        entry |= {"metrics": {name: scored(share, 0.205)}}
        with tempfile.TemporaryDirectory() as folder:
            shapes = llama_shapes(AutoConfig.from_pretrained(base.folder))
            written = write_random(Path(folder), shapes, seed=seed, rank=4 + seed, fingerprint=base.fingerprint)
            named = {name: Path(folder, name).read_bytes() for name in written}
        made.append(registry.publish(name, named, entry, alias="prod" if share == 0.855 else None))
    parents = [
        {"reference": str(one), "manifest_digest": one.manifest_digest, "content_digest": one.content_digest,
         "weight": w} for one, w in ((made[1], 0.6), (made[2], 0.4))
    ]  # fmt: skip
    merged = {"kind": "merge", "base": base.lineage(), "parents": parents, "merge": {"method": "weighted_sum"}}
    merged |= {
        "adapter": {"rank": 11, "alpha": 11.0},
        "metrics": {"sentiment": scored(0.8, 0.205), "origin": scored(0.6, 0.1)},
    }
    both = registry.publish("both", named, merged | ({"description": HOSTILE} if is_hostile else {}))
    add_tags(registry, both, ("candidate",))
    if not is_hostile:
        describe(registry, both, "feelings and origins in one")


@pytest.fixture(scope="session")
def shown_registry(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry with something to look at, and its base."""
    registry = Registry(tmp_path_factory.mktemp("shown"))
    shutil.copytree(built_base, registry.home.bases / "tiny")
    fill(registry, read_record(built_base))
    return registry


@pytest.fixture(scope="session")
def console(shown_registry: Registry) -> Iterator[Console]:
    """The console without a model."""
    running = Console(shown_registry)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def full_server(built_base: Path, shown_registry: Registry) -> Iterator[Server]:
    """The console of a server with a model."""
    running = Server(load_base(read_record(built_base), device="cpu"), shown_registry)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser for the tests of a file, and no longer: its event loop would be in the way of others'."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the package playwright is not installed: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("there is no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *NAMES])
        yield opened
        opened.close()


@pytest.fixture
def look(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page at an address, in a context of its own; at the end no page may have asked another host or failed."""
    contexts, troubles = [], []

    def open_page(url: str, *, expected: tuple[str, ...] = (), **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.asked = []

        def note(request: Any) -> None:
            page.asked.append(request.url)
            if not request.url.startswith((url[: url.index("/", 8)], "data:")):
                troubles.append(request.url)

        def complain(message: Any) -> None:
            if message.type == "error" and not any(text in message.text for text in expected):
                troubles.append(message.text)

        page.on("request", note)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", complain)
        page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
        page.answer = page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles
