"""Recipes: one TOML file that says everything a training run needs. No torch here."""

from adapterhub_local.recipe.reader import load_recipe, load_runs
from adapterhub_local.recipe.recipe import Recipe

__all__ = ["Recipe", "load_recipe", "load_runs"]
