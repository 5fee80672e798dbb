"""Runs that are started over HTTP: of recipes that lie on the machine, with what a run takes shown first.

A key can start what somebody with a shell put there: recipes in the folder `recipes` of the home, and those of earlier
runs. It can change numbers and words in them, but not the files that they name nor the code that they run.
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import Field

from adapterhub_local.errors import InputError, NotFound
from adapterhub_local.keys import Key
from adapterhub_local.recipe import Recipe, load_recipe
from serve.access import Scope, access
from serve.auth import check_models
from serve.errors import BadParameter
from serve.jobs import Job
from serve.registry_api.answers import answers
from serve.registry_api.bodies import Body, Name
from serve.registry_api.course_answers import JobAnswer, RecipeList
from serve.registry_api.library import Library
from serve.registry_api.reading import key_of

Change = Annotated[str, Field(max_length=200)]
FOLDER = "recipes"  # of a home
MAX_CHANGES = 50
MAX_RECIPES = 100  # that a list names
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CHANGE = re.compile(r"((?:train|adapter|eval)\.[a-z_]+|data\.limit|eval\.limit|[a-z_]+\.seed) *= *(.{1,100})")
_WORD = re.compile(r"[A-Za-z0-9_-]{1,60}")  # without a suffix it names no file


class StartBody(Body):
    """A recipe of this machine, or the recipe of an earlier run, with changes as `qhub train --set` takes them."""

    recipe: Name | None = None
    run: Name | None = None
    set: Annotated[list[Change], Field(default_factory=list, max_length=MAX_CHANGES, fail_fast=True)]


@dataclass(frozen=True)
class Chosen:
    """A recipe on this machine, as it would be trained."""

    path: Path
    changes: tuple[str, ...]
    recipe: Recipe

    def command(self, verb: str, *more: str) -> list[str]:
        """The words of `qhub` that do something with it."""
        return [verb, str(self.path), *(word for change in self.changes for word in ("--set", change)), *more, "--json"]


def recipes_here(library: Library, key: Key | None) -> list[dict[str, Any]]:
    """The recipes that can be started, with the name of what each makes, or why it cannot be used."""
    folder = library.registry.home.root / FOLDER
    found = []
    for path in sorted(folder.glob("*.toml"))[:MAX_RECIPES] if folder.is_dir() else ():
        try:
            recipe = load_recipe(path)
            check_models(key, [recipe.output.name])
            found.append({"recipe": path.name, "name": recipe.output.name, "base": recipe.base.name, "problem": None})
        except InputError as error:
            if key is None or not key.adapters:
                found.append({"recipe": path.name, "name": None, "base": None, "problem": str(error).splitlines()[0]})
    return found


def choose(library: Library, key: Key | None, body: StartBody) -> Chosen:
    """The recipe that is asked for, read. Raises BadParameter, BadRecipe, Forbidden, NotFound."""
    if (body.recipe is None) == (body.run is None):
        raise BadParameter("name a recipe of this machine, or an earlier run: one of both", "recipe")
    for change in body.set:
        _check_change(change)
    if body.run is not None:
        run = library.run(key, body.run)
        path, changes = Path(str(run.record.get("path") or "")), [*map(str, run.record.get("overrides") or ())]
        if not path.is_file():
            raise NotFound(f"the recipe of {run.id} is not there any more: put it into the home's folder {FOLDER}")
    else:
        path, changes = library.registry.home.root / FOLDER / str(body.recipe), []
        if not _NAME.fullmatch(str(body.recipe)) or path.suffix != ".toml" or not path.is_file():
            raise NotFound(f"there is no recipe '{body.recipe}' in the home's folder {FOLDER}")
    changes += body.set
    recipe = load_recipe(path, changes)
    check_models(key, [recipe.output.name])
    return Chosen(path, tuple(changes), recipe)


def plan(library: Library, chosen: Chosen) -> Job:
    """A job that estimates what training takes: what `qhub plan --json` prints. Raises Busy."""
    command = chosen.command("plan")
    return library.jobs.start(
        "plan", command, (chosen.recipe.output.name,), same=[*command, str(chosen.path.stat().st_mtime_ns)]
    )


def start(library: Library, chosen: Chosen) -> Job:
    """A job that trains. Raises Busy, InputError if there is a stopped run of the recipe already."""
    return library.jobs.start("train", chosen.command("train"), (chosen.recipe.output.name,))


def _check_change(text: str) -> None:
    found = _CHANGE.fullmatch(text.strip())
    if found is None:
        raise BadParameter(
            f"'{text[:80]}' cannot be changed from here: write train.KEY=VALUE, adapter.KEY=VALUE, eval.KEY=VALUE or "
            "data.limit=N; what names a file or code is changed in the recipe",
            "set",
        )
    try:
        value = tomllib.loads(f"value = {found[2]}")["value"]
    except tomllib.TOMLDecodeError:
        value = found[2]  # a bare word, as a shell leaves it
    words = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
    if isinstance(value, dict) or not all(_WORD.fullmatch(word) for word in words):
        raise BadParameter(
            f"'{text[:80]}' cannot be changed from here: its value must be a number, true, false or a word", "set"
        )


def add_starting(app: FastAPI, library: Library) -> None:
    """Add the endpoints."""

    @app.get("/v1/recipes", responses=answers(RecipeList))
    @access(Scope.ADMIN)
    def recipes(request: Request) -> dict[str, Any]:
        """The recipes in the home's folder `recipes`, which can be started."""
        return {"object": "list", "data": recipes_here(library, key_of(request))}

    @app.post("/v1/plans", status_code=202, responses=answers(JobAnswer, 202))
    @access(Scope.ADMIN)
    def make_plan(body: StartBody, request: Request) -> dict[str, Any]:
        """Estimate what a run takes, and whether it fits: a job."""
        return plan(library, choose(library, key_of(request), body)).to_json()

    @app.post("/v1/runs", status_code=202, responses=answers(JobAnswer, 202))
    @access(Scope.ADMIN)
    def start_run(body: StartBody, request: Request) -> dict[str, Any]:
        """Train: a job, whose result is the new version. The run is in /v1/runs once its base is loaded."""
        return start(library, choose(library, key_of(request), body)).to_json()


def described(chosen: Chosen) -> Sequence[tuple[str, str]]:
    """What of a recipe is worth a look before it is trained."""
    recipe = chosen.recipe
    return [
        ("Makes", recipe.output.name),
        ("Base", recipe.base.name),
        ("Objective", recipe.train.objective),
        ("Rank", str(recipe.adapter.rank)),
        ("Length", f"{recipe.train.max_steps} steps" if recipe.train.max_steps else f"{recipe.train.epochs:g} epochs"),
        ("Batch", str(recipe.train.batch_size)),
        ("Learning rate", f"{recipe.train.learning_rate:g}"),
    ]
