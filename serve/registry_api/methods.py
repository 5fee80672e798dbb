"""Several merges side by side on held-out examples, as a job: what `qhub try-merges --json` prints. None is kept."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import Field

from adapterhub_local.base.bases import base_of
from adapterhub_local.errors import InputError
from adapterhub_local.keys import Key
from adapterhub_local.merge.spelled import parse_formula
from adapterhub_local.registry.kinds import check_adapter
from serve.access import Scope, access
from serve.errors import BadParameter
from serve.jobs import Job
from serve.registry_api.answers import answers
from serve.registry_api.bodies import MAX_MERGED, Body, Name, Weight
from serve.registry_api.course_answers import JobAnswer
from serve.registry_api.library import Library
from serve.registry_api.reading import key_of
from serve.registry_api.starting import StartBody, choose

MAX_METHODS, MAX_EXAMPLES = 4, 20
Method = Annotated[str, Field(min_length=1, max_length=300)]


class MethodsBody(Body):
    """Merges of the same adapters, to be asked the first held-out examples of a recipe of this machine, or of a run.

    A method is spelled with its settings: `ties density=0.2 rank=16`.
    """

    adapters: Annotated[list[Name], Field(min_length=1, max_length=MAX_MERGED, fail_fast=True)]
    weights: Annotated[list[Weight], Field(min_length=1, max_length=MAX_MERGED, fail_fast=True)]
    methods: Annotated[list[Method], Field(min_length=1, max_length=MAX_METHODS, fail_fast=True)]
    recipe: Name | None = None
    run: Name | None = None
    examples: Annotated[int, Field(ge=1, le=MAX_EXAMPLES)] = 10


def try_merges(library: Library, key: Key | None, body: MethodsBody) -> Job:
    """The job. What cannot be merged, and a base that is not here, is refused before it starts.

    Raises BadParameter, InputError, Incompatible, Forbidden, NotFound, Busy.
    """
    if len(body.weights) != len(body.adapters):
        raise BadParameter("there must be one weight for each adapter", "weights")
    versions = [check_adapter(library.resolve(key, reference)) for reference in body.adapters]
    methods = [" ".join(text.split()) for text in body.methods]
    if len(set(methods)) < len(methods):
        raise InputError("two of the methods are the same: give each once")
    for text in methods:
        parse_formula(text).check(body.weights)
    base_of(versions[0], library.registry.home)
    chosen = choose(library, key, StartBody(recipe=body.recipe, run=body.run, set=[]))
    words = ["try-merges", *map(str, versions), f"--weights={','.join(map(repr, body.weights))}"]
    words += [f"--method={text}" for text in methods]
    words += [f"--recipe={chosen.path}", *(f"--set={change}" for change in chosen.changes)]
    words += [f"--limit={body.examples}", "--json"]
    about = [*(version.name for version in versions), chosen.recipe.output.name]
    data = [path for path in chosen.recipe.data.test or () if isinstance(path, Path)]
    times = [str(path.stat().st_mtime_ns) for path in (chosen.path, *data) if path.exists()]
    return library.jobs.start("methods", words, about, same=[*words, *times])


def add_methods(app: FastAPI, library: Library) -> None:
    """Add the endpoint."""

    @app.post("/v1/merges/methods", status_code=202, responses=answers(JobAnswer, 202))
    @access(Scope.ADMIN)
    def methods(body: MethodsBody, request: Request) -> dict[str, Any]:
        """Ask several merges of the same adapters a few held-out examples, without keeping one: a job."""
        return try_merges(library, key_of(request), body).to_json()
