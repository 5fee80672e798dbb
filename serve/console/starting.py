"""The page on which a run is started: a recipe of this machine, what it takes, and only then the button."""

from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import RedirectResponse, Response

from adapterhub_local.errors import InputError, NotFound, QhubError
from adapterhub_local.keys import Key
from serve.access import Scope, access
from serve.console import views
from serve.console.actions import Form
from serve.console.budget import fitted, part
from serve.console.forms import Fields
from serve.console.render import HEADERS, render, shown
from serve.console.texts import LINE, cut
from serve.errors import error_body
from serve.registry_api.library import Library
from serve.registry_api.reading import Text, key_of
from serve.registry_api.starting import (
    FOLDER,
    MAX_RECIPES,
    Chosen,
    StartBody,
    choose,
    described,
    plan,
    recipes_here,
    start,
)

Changes = Annotated[str | None, Query(max_length=5000)]
PAGE = "/console/runs/new"
MAX_TEXT = 20_000  # bytes of a recipe


def add_start_page(app: FastAPI, library: Library) -> None:
    """Add it, and what its two buttons do."""

    @app.get(PAGE, include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def new_run(
        request: Request, recipe: Text = None, run: Text = None, changes: Changes = None, job: Text = None
    ) -> Response:
        """A recipe, what it takes once that is known, and the button that starts it."""
        return start_page(library, request, recipe or "", run or "", changes or "", job or "")

    @app.post("/console/runs/plan", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def plan_run(request: Request, form: Form) -> Response:
        """Estimate what the run takes."""
        recipe, run, changes = (form.one(name) for name in ("recipe", "run", "changes"))
        try:
            job = plan(library, choose(library, key_of(request), _body(form)))
        except QhubError as error:
            return start_page(library, request, recipe, run, changes, "", str(error), error_body(error).status)
        return _to(views.with_query(PAGE, recipe=recipe, run=run, changes=changes, job=job.id))

    @app.post("/console/runs/start", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def start_run(request: Request, form: Form) -> Response:
        """Train, if the plan of this very recipe was seen."""
        recipe, run, changes, job = (form.one(name) for name in ("recipe", "run", "changes", "job"))
        try:
            chosen = choose(library, key_of(request), _body(form))
            found = _plan_of(library, key_of(request), chosen, job)
            if found is None or found["state"] != "done":
                raise InputError("look at what the run takes first: the recipe or its changes are others now")
            if not views.mapping(found["result"]).get("fits") and form.one("anyway") != "yes":
                raise InputError("it does not fit: tick the box to start it nevertheless")
            made = start(library, chosen)
        except QhubError as error:
            return start_page(library, request, recipe, run, changes, job, str(error), error_body(error).status)
        return _to(f"/console/jobs/{made.id}")


def start_page(
    library: Library, request: Request, recipe: str, run: str, changes: str, job: str,
    message: str | None = None, status: int = 200,
) -> Response:  # fmt: skip
    """The page, with a message of what did not work."""
    key = key_of(request)
    chosen: Chosen | None = None
    if recipe or run:
        try:
            chosen = choose(library, key, _read(recipe, run, changes))
        except QhubError as error:
            message, status = message or str(error), status if message else error_body(error).status
    found = _plan_of(library, key, chosen, job) if chosen is not None and job else None
    result = views.mapping(found["result"]) if found else {}
    known = [{**one, "problem": cut(one["problem"], 2 * LINE)} for one in recipes_here(library, key)]
    facts = [(name, cut(value, LINE)) for name, value in described(chosen)] if chosen else []

    def made(share: float) -> Response:
        shown_recipes = known[: part(MAX_RECIPES, share)]
        return render(
            request, "start.html", status=status, message=message, recipes=shown_recipes, folder=FOLDER,
            recipe=recipe, run=run, changes=changes, facts=facts, more_recipes=len(known) - len(shown_recipes),
            text=cut(chosen.recipe.text, part(MAX_TEXT, share)) if chosen else None, job=found,
            verdict=_verdict(result) if result else None,
        )  # fmt: skip

    return fitted(made)


def _plan_of(library: Library, key: Key | None, chosen: Chosen, job: str) -> dict[str, Any] | None:
    """The job that planned this recipe with these changes, None if it planned another."""
    try:
        found = library.job(key, job).to_json()
    except NotFound:
        return None
    return found if found["command"][1:] == chosen.command("plan") else None


def _verdict(result: Any) -> dict[str, Any]:
    needed = views.number(views.mapping(result.get("bytes")).get("total"))
    device = views.mapping(result.get("device"))
    time, rows = views.mapping(result.get("time")), views.mapping(result.get("rows"))
    seconds, steps = views.number(time.get("seconds")), views.number(time.get("steps"))
    return {
        "fits": bool(result.get("fits")),
        "memory": views.size_text(needed) if needed is not None else "unknown",
        "device": f"{device.get('name') or ''} with {views.size_text(views.number(device.get('memory')) or 0)}",
        "time": "unknown" if seconds is None else views.duration_text(seconds),
        "steps": "" if steps is None else f"{steps:,.0f}",
        "examples": f"{views.number(rows.get('examples')) or 0:,.0f}",
        "basis": str(time.get("basis") or ""),
    }


def _read(recipe: str, run: str, changes: str) -> StartBody:
    lines = [line.strip() for line in changes.splitlines() if line.strip()]
    try:
        return StartBody(recipe=recipe or None, run=run or None, set=lines)
    except ValueError:
        raise InputError("write at most 50 changes, a line each, such as train.epochs=2") from None


def _body(form: Fields) -> StartBody:
    return _read(form.one("recipe"), form.one("run"), form.one("changes"))


def _to(path: str) -> Response:
    return RedirectResponse(path, 303, HEADERS)
