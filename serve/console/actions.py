"""What the pages' forms do: sign in and out, measure, stop and resume, cancel. An adapter's own are in changes.py."""

import contextlib
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import RedirectResponse, Response

from adapterhub_local.errors import InputError, InUse, QhubError
from adapterhub_local.train.past_runs import ask_to_stop
from serve.access import Scope, access
from serve.auth import Gate
from serve.console import views
from serve.console.forms import Fields, read_form
from serve.console.render import HEADERS, render, shown
from serve.console.session import COOKIE, HOME, LOGIN, SECONDS, Sessions, cookie_of
from serve.errors import error_body
from serve.registry_api.library import Library
from serve.registry_api.reading import Text, key_of

Form = Annotated[Fields, Depends(read_form)]


def add_actions(app: FastAPI, library: Library, sessions: Sessions) -> None:
    """Add them."""
    _add_session(app, sessions)

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
        job = next(running, None) or library.jobs.start("train", command, (str(run.record.get("name") or ""),))
        return _to(views.with_query(f"/console/runs/{run.id}", job=job.id))

    @app.post("/console/jobs/cancel", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def cancel(request: Request, form: Form) -> Response:
        """Ask a job to end; one that has ended meanwhile stays as it is, and its page says how it ended."""
        job = library.job(key_of(request), form.one("job"))
        with contextlib.suppress(InUse):
            library.jobs.cancel(job.id)
        return _to(f"/console/jobs/{job.id}")


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
