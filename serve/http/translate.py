"""Translate: answer a request of another API by the chat request that it amounts to, mistakes in its own names."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from serve.answers.completions import Answer
from serve.answers.events import AnswerForm
from serve.errors import BadParameter, ContextTooLong
from serve.http.bodies import apart
from serve.http.respond import respond
from serve.requests.generation import GenerationRequest
from serve.service import Service

Asked = TypeVar("Asked")


def read(convert: Callable[[], Asked]) -> Asked:
    """What `convert` makes of a body. Raises RequestValidationError, as for a body that was wrong at once."""
    try:
        return convert()
    except PydanticCustomError as error:
        line = {"type": error.type, "loc": ("body",), "msg": error.message(), "ctx": dict(error.context or {})}
        raise RequestValidationError([line]) from None
    except ValidationError as error:
        lines = [line | {"loc": ("body", *line["loc"])} for line in error.errors(include_url=False)]
        raise RequestValidationError(lines) from None


async def answer(
    service: Service,
    convert: Callable[[], GenerationRequest],
    request: Request,
    form: Callable[[Answer], AnswerForm],
    names: Mapping[str, str],
) -> Response:
    """The answer to what `convert` makes of a body; `names`: parameters of a chat -> what the body calls them."""
    try:
        return await respond(service, await apart(request, lambda: read(convert)), request, form)
    except (BadParameter, ContextTooLong) as error:
        error.param = names.get(error.param, error.param).partition(".")[0]
        raise
