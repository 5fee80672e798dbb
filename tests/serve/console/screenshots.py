"""The pictures of the docs: the console over the demo's registry, or over one made for it, looked at by a real browser.

python -m tests.serve.console.screenshots docs/pictures           # of the home if it has the demo's adapters
"""

import sys
import tempfile
from pathlib import Path

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import read_record
from adapterhub_local.registry import Registry
from adapterhub_local.settings import home as home_at
from tests.serve.console.conftest import CHROMIUM, Console, fill
from tests.tiny import save_tiny_model

SHOTS = (
    ("adapters", "/console", 1200, 360, "light"),
    ("task", "/console/tasks/sentiment?versions=all", 1200, 360, "light"),
    ("adapter", "/console/adapters/both", 1200, 760, "light"),
    ("compare", "/console/compare?left=sentiment%401&right=origin%401", 1200, 700, "dark"),
    ("merge", "/console/merge?m=sentiment%401&m=origin%401&w=0.6&w=0.4", 1200, 900, "light"),
)
DEMO = {"sentiment", "origin", "both"}


def take(folder: Path) -> None:
    """Write a PNG for each of the pages."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as place:
        registry = Registry()
        if not registry.home.database.exists() or not set(registry.names()) >= DEMO:
            home = home_at(Path(place) / "home")
            add_base("tiny", save_tiny_model(Path(place) / "model"), home, hub_id="someone/tiny")
            registry = Registry(home)
            fill(registry, read_record(home.bases / "tiny"), is_hostile=False)
        console = Console(registry)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with sync_playwright() as driver:
                browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                for name, path, width, height, scheme in SHOTS:
                    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                    page.goto(console.url + path)
                    button = {"compare": "Measure", "merge": "See what"}.get(name)
                    if button:
                        page.locator(f"button:has-text('{button}')").click()
                        page.locator("svg.heat").wait_for(timeout=120_000)
                        page.locator("svg.heat").scroll_into_view_if_needed()
                    page.screenshot(path=str(folder / f"{name}.png"))
                browser.close()
        finally:
            console.stop()


if __name__ == "__main__":
    take(Path(sys.argv[1]))
