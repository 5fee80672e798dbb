"""The console and the registry's API as parts of an application: of the server, or of `qhub console` alone."""

from typing import Any

from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from serve.access import Routes, Scope, access
from serve.auth import Gate
from serve.console.actions import add_actions
from serve.console.boards import add_boards
from serve.console.changes import add_changes
from serve.console.error_pages import ErrorPages
from serve.console.merging import add_merging
from serve.console.methods import add_methods_page
from serve.console.pages import add_pages
from serve.console.session import HOME, SessionLayer, Sessions
from serve.console.starting import add_start_page
from serve.console.workbench import add_workbench
from serve.http.blank import blank_app, closing_jobs
from serve.http.failures import handle_errors
from serve.http.front import Front
from serve.http.guard import Guard
from serve.jobs import Jobs
from serve.metrics import Metrics
from serve.options import HttpOptions
from serve.registry_api.changing import add_changing
from serve.registry_api.library import Library
from serve.registry_api.methods import add_methods
from serve.registry_api.reading import add_reading
from serve.registry_api.starting import add_starting


def add_console(app: FastAPI, library: Library, gate: Gate, base: BaseInfo | None) -> None:
    """Add pages and endpoints, and the layer that knows sessions, which must lie outside of `Front`.

    `base` is the one that is served, None where there is no engine.
    """
    app.state.library = library
    app.state.has_engine = library.engine is not None
    app.state.base_name = base.name if base is not None else None
    app.state.base_fingerprint = base.fingerprint if base is not None else None
    sessions = Sessions(gate)
    app.add_middleware(ErrorPages)
    app.add_middleware(SessionLayer, sessions=sessions)
    add_reading(app, library)
    add_changing(app, library)
    add_starting(app, library)
    add_actions(app, library, sessions)
    add_changes(app, library)
    add_workbench(app, library)
    add_start_page(app, library)  # before the page of one run, whose path it would fit
    add_boards(app, library)
    add_merging(app, library)
    add_methods(app, library)
    add_methods_page(app, library)
    add_pages(app, library)


def console_app(registry: Registry, http: HttpOptions) -> FastAPI:
    """The console without a model. Loads no torch, and is ready at once."""
    library = Library(registry, Jobs(registry.home))
    app = blank_app(closing_jobs(library))
    gate = Gate(Keys(registry.home), is_required=http.require_keys)
    routes: Routes  # known once all are added
    app.add_middleware(
        Front, access=lambda scope: routes.access(scope), gate=gate, options=lambda: http, metrics=Metrics(_no_engine)
    )
    add_console(app, library, gate, None)
    app.add_middleware(Guard, gate=gate, hosts=http.hosts, origins=())
    handle_errors(app)

    @app.get("/", include_in_schema=False)
    @access(Scope.OPEN)
    def index() -> Response:
        """The console is all there is."""
        return RedirectResponse(HOME, 303)

    @app.get("/openapi.json", include_in_schema=False)
    @access(Scope.ANY)
    def openapi() -> dict[str, Any]:
        """The endpoints and their bodies, for tools."""
        return app.openapi()

    routes = Routes(app)
    return app


def _no_engine() -> Any:
    raise LookupError("the console alone has no engine whose numbers could be shown")
