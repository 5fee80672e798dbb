"""Pages: templates with escaping on, a content policy that runs no script but our files, and errors as pages."""

import functools
import hashlib
from collections.abc import Callable
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, FunctionLoader, StrictUndefined, select_autoescape

from adapterhub_local.errors import QhubError
from serve.console import texts
from serve.errors import error_body

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "same-origin",  # with no-referrer our own forms would come from nowhere
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
SCRIPTS = ("live.js", "play.js", "answer.js", "blind.js", "fields.js", "parts.js")
STATIC = {"console.css": "text/css; charset=utf-8"} | dict.fromkeys(SCRIPTS, "text/javascript; charset=utf-8")
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def _source(name: str) -> str | None:
    place = files("serve.console") / "templates" / name
    return place.read_text(encoding="utf-8") if place.is_file() else None


@functools.cache
def static(name: str) -> tuple[bytes, str, str] | None:
    """The bytes, the type and the tag of a file of the pages, None if there is none."""
    if name not in STATIC:
        return None
    data = (files("serve.console") / "static" / name).read_bytes()
    return data, STATIC[name], f'"{hashlib.sha256(data).hexdigest()[:16]}"'


@functools.cache
def environment() -> Environment:
    """The templates; a name that a template does not get is a mistake, not an empty place.

    Every value that a template writes passes `texts.shown`, so that no page forgets to.
    """
    made = Environment(
        loader=FunctionLoader(_source),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        finalize=texts.shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"exact": texts.exact, "cut": texts.cut}
    made.globals["static"] = lambda name: f"/console/static/{name}?v={(static(name) or (b'', '', ''))[2][1:9]}"
    return made


def render(request: Request, template: str, /, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page."""
    state = request.scope.get("state", {})
    key = state.get("key")
    common = {
        "path": request.url.path,
        "is_signed_in": state.get("session") is not None,
        "may_change": key is None or "admin" in key.scopes,
        "may_ask": key is None or "infer" in key.scopes,
        "has_engine": request.app.state.has_engine,
        "base_name": request.app.state.base_name,
    }
    text = environment().get_template(template).render(**common, **values)
    return HTMLResponse(text, status, HEADERS)


def shown(endpoint: Endpoint) -> Endpoint:
    """The endpoint of a page, whose errors are pages too."""

    @functools.wraps(endpoint)
    def guarded(*args: Any, **values: Any) -> Response:
        try:
            answer: Response = endpoint(*args, **values)
            return answer
        except QhubError as error:
            body = error_body(error)
            request = values["request"]
            response = render(request, "error.html", status=body.status, status_code=body.status, message=body.message)
            response.headers.update(dict(body.headers))
            return response

    return guarded  # type: ignore[return-value]
