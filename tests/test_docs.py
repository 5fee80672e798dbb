"""The README and the pages of the rooms say what is so."""

import re
from pathlib import Path

import pytest

from adapterhub_local.cli.main import VERBS
from adapterhub_local.recipe.reference import reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "recipes/README.md", ROOT / "serve/README.md", *(ROOT / "adapterhub_local").glob("*/README.md")])


def test_every_recipe_key_is_described() -> None:
    """The table of keys in recipes/README.md is the schema's (python -m adapterhub_local.recipe.reference)."""
    assert reference() in (ROOT / "recipes/README.md").read_text()


def test_the_shown_recipe_is_shipped() -> None:
    """The recipe in the README is recipes/sentiment.toml."""
    assert (ROOT / "recipes/sentiment.toml").read_text().strip() in README


def test_every_verb_is_mentioned() -> None:
    """No command is left out of the README and its pages, and none that they show is unknown."""
    text = "\n".join([README, *(page.read_text() for page in PAGES)])
    shown = set(re.findall(r"qhub ([a-z]+(?:-[a-z]+)*)", text))

    assert set(VERBS) <= shown
    assert shown <= set(VERBS)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """A link to a file of this project names one that is there, and every page of a room is linked by the README."""
    targets = [target for target in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in target]

    assert all((page.parent / target).exists() for target in targets)
    assert page == ROOT / "README.md" or f"({page.relative_to(ROOT)})" in README
