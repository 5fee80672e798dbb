"""What the pages' forms do: sign in and out, move an alias, give a tag, measure, stop and resume."""

import json
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import RedirectResponse, Response

from adapterhub_local.errors import InputError, InUse, NotFound, QhubError
from adapterhub_local.train.past_runs import ask_to_stop
from serve.access import Scope, access
from serve.auth import Gate, check_models
from serve.console import views
from serve.console.adapter_page import adapter_page
from serve.console.forms import Fields, read_form
from serve.console.render import HEADERS, render, shown
from serve.console.session import COOKIE, HOME, LOGIN, SECONDS, Sessions, cookie_of
from serve.errors import error_body
from serve.registry_api.bodies import AliasBody
from serve.registry_api.changing import change_tags, move_alias
from serve.registry_api.library import Library
from serve.registry_api.reading import Text, key_of

Form = Annotated[Fields, Depends(read_form)]


def add_actions(app: FastAPI, library: Library, sessions: Sessions) -> None:
    """Add them."""
    _add_session(app, sessions)

    @app.post("/console/alias", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def alias(request: Request, form: Form) -> Response:
        """Move an alias, if it is still where the page showed it."""
        name, moved, version = form.one("name"), form.one("alias"), form.number("version")
        try:
            state = json.loads(form.one("state") or "{}")
            expected = state.get(moved) if isinstance(state, dict) else None
        except ValueError:
            raise InputError("this form cannot be read: load its page again") from None
        try:
            if version is None or version < 1:
                raise InputError("write the number of the version that the alias is to point to")
            if expected is not None and not isinstance(expected, int):
                raise InputError("this form cannot be read: load its page again")
            body = AliasBody.model_construct(
                {"alias", "version", "expect"}, alias=moved, version=version, expect=expected
            )
            move_alias(library, key_of(request), name, body)
        except (InUse, NotFound, InputError) as error:
            check_models(key_of(request), [name])
            library.registry.resolve(name)  # else there is no page to show it on
            return adapter_page(library, request, name, None, str(error), error_body(error).status)
        return _to(views.version_link(name))

    @app.post("/console/tags", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def tags(request: Request, form: Form) -> Response:
        """Give a tag to a version, or take it off."""
        given, reference = [form.one("tag")], form.one("reference")
        add, remove = ([], given) if form.one("do") == "remove" else (given, [])
        change_tags(library, key_of(request), reference, add, remove)
        return _to(views.version_link(reference))

    @app.post("/console/compare/modules", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def compare(request: Request, form: Form) -> Response:
        """Measure the modules of two versions."""
        left, right = form.one("left"), form.one("right")
        job = library.compare_modules(key_of(request), left, right)
        return _to(views.with_query("/console/compare", left=left, right=right, job=job.id))

    @app.post("/console/runs/stop", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def stop(request: Request, form: Form) -> Response:
        """Ask a run to stop after its step."""
        run = library.run(key_of(request), form.one("run"))
        if run.status == "running":
            ask_to_stop(run)
        return _to(f"/console/runs/{run.id}")

    @app.post("/console/runs/resume", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def resume(request: Request, form: Form) -> Response:
        """Go on with a run that was stopped, as `qhub train --resume` with the same recipe does."""
        run = library.run(key_of(request), form.one("run"))
        recipe = run.record.get("path")
        if not run.can_resume or not recipe:
            raise InputError(f"{run.id} is {run.status}: it cannot be resumed from here")
        changes = [word for change in run.record.get("overrides") or () for word in ("--set", str(change))]
        command = ("train", str(recipe), *changes, "--resume", "--json")
        # a second click, before the run has started, is about the first one's job
        running = (one for one in library.jobs.all() if one.state == "running" and one.command == command)
        job = next(running, None) or library.jobs.start("train", command)
        return _to(views.with_query(f"/console/runs/{run.id}", job=job.id))


def _add_session(app: FastAPI, sessions: Sessions) -> None:
    @app.get("/console/login", include_in_schema=False)
    @access(Scope.OPEN)
    @shown
    def login(request: Request, next: Text = None) -> Response:  # noqa: A002 - as the address has it
        """Where an API key is shown."""
        return render(request, "login.html", next=_own_path(next), message=None)

    @app.post("/console/login", include_in_schema=False)
    @access(Scope.OPEN)
    def sign_in(request: Request, form: Form) -> Response:
        """Open a session for whoever has a key."""
        target = _own_path(form.one("next"))
        try:
            value = sessions.open(form.one("key"))
        except QhubError as error:
            body = error_body(error)
            response = render(request, "login.html", status=body.status, next=target, message=body.message)
            response.headers.update({name: text for name, text in body.headers if name != "WWW-Authenticate"})
            return response
        answer = _to(target)
        answer.set_cookie(
            COOKIE, value, max_age=int(SECONDS), httponly=True, samesite="strict", secure=request.url.scheme == "https"
        )
        return answer

    @app.post("/console/logout", include_in_schema=False)
    @access(Scope.OPEN)
    def sign_out(request: Request, form: Form) -> Response:
        """End the session."""
        sessions.close(cookie_of(request.headers))
        answer = _to(LOGIN if not _is_open(sessions.gate) else HOME)
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return answer


def _is_open(gate: Gate) -> bool:
    try:
        return gate.is_open()
    except QhubError:
        return False


def _own_path(text: str | None) -> str:
    """A page of ours to continue to, never another site's."""
    is_ours = text is not None and (text == HOME or text.startswith((f"{HOME}/", f"{HOME}?")))
    return text if is_ours and text and text.isprintable() and "\\" not in text else HOME


def _to(path: str) -> Response:
    return RedirectResponse(path, 303, HEADERS)
