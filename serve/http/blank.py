"""An application before anything is added to it: name, version, how it starts and ends, and no pages of its own."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version as installed

from fastapi import FastAPI

from serve.http.bodies import read_apart
from serve.registry_api.library import Library

PACKAGE = "adapterhub-local"
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def blank_app(lifespan: Lifespan, *, root_path: str = "") -> FastAPI:
    """An application that reads large bodies apart, without FastAPI's own pages, which would declare no access."""
    app = FastAPI(
        title=PACKAGE, version=installed(PACKAGE), lifespan=lifespan, root_path=root_path,
        docs_url=None, redoc_url=None, openapi_url=None,
        redirect_slashes=False,  # `front` takes a slash at the end away: it would come back for ever
    )  # fmt: skip
    read_apart(app)
    return app


def closing_jobs(library: Library) -> Lifespan:
    """The life of an application that starts nothing and ends the jobs of `library` when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        library.jobs.close()

    return lifespan
