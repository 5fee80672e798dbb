"""Translated: a body of another API as the request that it amounts to, mistakes in the names of its sender."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

Model = TypeVar("Model", bound=BaseModel)


def translated(model: type[Model], body: Mapping[str, Any], names: Mapping[str, str]) -> Model:
    """`body` as a `model`. Raises ValidationError in the words of `names`, dotted where they are nested."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        lines = [_renamed(line, names) for line in error.errors(include_url=False)]
        raise ValidationError.from_exception_data(model.__name__, lines) from None


def _renamed(line: Any, names: Mapping[str, str]) -> Any:
    """An error's line about the parameter as its sender calls it."""
    first, *rest = line["loc"] or ("",)
    loc = (*names.get(first, first).split("."), *rest) if isinstance(first, str) and line["loc"] else line["loc"]
    context = dict(line.get("ctx", {}))
    if "param" in context:
        context["param"] = names.get(context["param"], context["param"]).partition(".")[0]
    kind = PydanticCustomError(line["type"], line["msg"], context or None)
    return {"type": kind, "loc": loc, "input": line["input"]}
