"""Failures: every error that is expected as an OpenAI error body; `Front` answers the others."""

import json
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from adapterhub_local.errors import QhubError
from serve.errors import Elsewhere, ErrorBody, error_body
from serve.http.bodies import InvalidBody
from serve.http.front import own_path
from serve.http.invalid import invalid_body, unknown_path

ELSEWHERE = "application/vnd.qhub.elsewhere+json"  # how a gateway learns that a request belongs elsewhere


def handle_errors(app: FastAPI) -> None:
    """Every error that is expected as an OpenAI error body; `Front` answers the others."""

    @app.exception_handler(QhubError)
    async def known(request: Request, error: QhubError) -> Response:
        return _error_response(error_body(error), own_path(request.scope))

    @app.exception_handler(Elsewhere)
    async def elsewhere(request: Request, error: Elsewhere) -> Response:
        return Response(json.dumps(error.details), 421, media_type=ELSEWHERE)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found = invalid_body(error.errors(), request.headers.get("content-type", ""))
        return _error_response(found, own_path(request.scope))

    @app.exception_handler(InvalidBody)
    async def invalid_large(request: Request, error: InvalidBody) -> Response:
        found = invalid_body(error.errors, request.headers.get("content-type", ""))
        return _error_response(found, own_path(request.scope))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        method, path = request.scope["method"], own_path(request.scope)
        if error.status_code == 404:
            return _error_response(unknown_path(method, path, paths_of(app)), path)
        message = f"{method} {path}: {error.detail}"
        return _error_response(ErrorBody(error.status_code, message, "invalid_request_error"), path, error.headers)


def paths_of(app: FastAPI) -> list[str]:
    """The addresses that are answered."""
    return sorted({route.path for route in app.routes if isinstance(route, APIRoute)})


def _error_response(body: ErrorBody, path: str, headers: Any = None) -> Response:
    # escaped: what an error quotes may be half a character
    content = json.dumps(body.to_json(path))
    return Response(content, body.status, {**(headers or {}), **dict(body.headers)}, "application/json")
