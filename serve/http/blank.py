"""An application before anything is added to it: name, version, how it starts and ends, and no pages of its own."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version as installed
from typing import Any

from fastapi import FastAPI

from serve.http.bodies import read_apart
from serve.registry_api.library import Library

PACKAGE = "adapterhub-local"
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


class Application(FastAPI):
    """An application whose description says of an answer what its route declares, and nothing beside it."""

    def openapi(self) -> dict[str, Any]:
        """The endpoints with their bodies and answers, for tools."""
        if self.openapi_schema is None:
            for operation in (one for path in super().openapi()["paths"].values() for one in path.values()):
                for answer in operation["responses"].values():
                    for content in answer.get("content", {}).values():
                        if (model := content.get("schema", {}).get("$ref")) is not None:
                            content["schema"] = {"$ref": model}  # without what is known of an endpoint's own type
        return super().openapi()


def blank_app(lifespan: Lifespan, *, root_path: str = "") -> FastAPI:
    """An application that reads large bodies apart, without FastAPI's own pages, which would declare no access."""
    app = Application(
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
