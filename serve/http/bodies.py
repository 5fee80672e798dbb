"""Bodies: large ones are read and checked in a thread of their own, one after the other, so that they hold up nobody.

To parse and validate 4 MB takes up to half a second. On the event loop all streams and probes would stand still
meanwhile; in many threads at once they would wait for each of them in turn, since parsers do not let go of Python's
lock. A small body is read at once: handing it over would cost more than reading it.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from adapterhub_local.errors import InputError

LARGE = 64 << 10  # bytes
MAX_FIELDS = 10_000  # of one object of a large body
MAX_VALUES = 200_000  # lists, objects and keys: to make more holds up all others, whichever thread does it
Result = TypeVar("Result")
_room = ThreadPoolExecutor(1, "bodies")


class InvalidBody(HTTPException):
    """What is wrong with a body, in pydantic's form; an HTTPException because FastAPI lets no other through here."""

    def __init__(self, errors: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(400)
        self.errors = [{**line, "loc": ("body", *line["loc"])} for line in errors]


class BodyRoute(APIRoute):
    """A route whose body, if it is large, is read and checked apart; what the endpoint gets is the same."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()
        kind = self.body_field.field_info.annotation if self.body_field is not None else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return answer
        model = kind

        async def handle(request: Request) -> Response:
            return await answer(_BodyRequest(request, model))

        return handle


class _BodyRequest(Request):
    """A request whose JSON, if it is large, is a `model` already: FastAPI takes that as it is."""

    def __init__(self, request: Request, model: type[BaseModel]) -> None:
        super().__init__(request.scope, request.receive)
        self._model = model

    async def json(self) -> Any:
        body = await self.body()
        return await (apart(self, lambda: _read(self._model, body)) if room_of(body) else super().json())


def _read(model: type[BaseModel], body: bytes) -> BaseModel:
    value = json.loads(body, object_hook=_bounded, parse_int=_int, parse_float=_float)
    try:
        return model.model_validate(value, from_attributes=True)  # as FastAPI does, for the same errors
    except ValidationError as error:
        raise InvalidBody(error.errors(include_url=False)) from None


def _bounded(value: dict[str, Any]) -> dict[str, Any]:
    """An object that has not too many fields: each could be an error of its own."""
    if len(value) > MAX_FIELDS:
        message = f"an object may have {MAX_FIELDS:,} fields, one in this body has {len(value):,}"
        raise InvalidBody([{"type": "too_long", "loc": (), "msg": message}])
    return value


# In Python, though C would do: where Python runs, the interpreter can hand its lock on to those who wait for it.
def _int(text: str) -> int:
    return int(text)


def _float(text: str) -> float:
    return float(text)


def read_apart(app: FastAPI) -> None:
    """Have all routes that are added from now on read large bodies apart."""
    app.router.route_class = BodyRoute


def room_of(body: bytes) -> Executor | None:
    """Where a body is looked at: large ones in the thread of their own, others in the loop's executor (None)."""
    return _room if len(body) >= LARGE else None


async def apart(request: Request, work: Callable[[], Result]) -> Result:
    """What `work` makes of the request's body, done apart if that is large. Raises what `work` raises."""
    room = room_of(await request.body())
    return work() if room is None else await asyncio.get_running_loop().run_in_executor(room, work)


def check_values(body: bytes) -> None:
    """Raise InputError about a body that may have more lists, objects and keys than are made of one."""
    if len(body) >= LARGE and num_values(body) > MAX_VALUES:
        raise InputError(f"a body may have {MAX_VALUES:,} lists, objects and keys, this one may have more")


def num_values(body: bytes) -> int:
    """How many lists, objects and keys a JSON text has at most.

    Counted is what could be one: brackets wherever they stand, and colons but for those behind an escaped quote, which
    are the keys of JSON that is somebody's text.
    """
    in_texts = body.count(b'\\":') - body.count(b'\\\\":')  # behind two backslashes a quote may end a key
    return body.count(b"[") + body.count(b"{") + body.count(b":") - in_texts
