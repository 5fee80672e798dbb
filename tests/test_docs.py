"""The README says what is so."""

import re
from pathlib import Path

from adapterhub_local.cli.main import VERBS
from adapterhub_local.recipe.reference import reference

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_every_recipe_key_is_described() -> None:
    """The README's table of keys is the one the schema gives (python -m adapterhub_local.recipe.reference)."""
    assert reference() in README


def test_the_shown_recipe_is_shipped() -> None:
    """The recipe in the README is recipes/sentiment.toml."""
    assert (Path(__file__).parent.parent / "recipes" / "sentiment.toml").read_text().strip() in README


def test_every_verb_is_mentioned() -> None:
    """No command is left out of the README, and none that it shows is unknown."""
    shown = set(re.findall(r"qhub ([a-z]+(?:-[a-z]+)*)", README))

    assert set(VERBS) <= shown
    assert shown <= set(VERBS)
