"""The parts of a body: null is as if left out, a whole number may be written as 16.0, an empty text asks for nothing.

JSON has no integers, so clients in R, Lua or JavaScript write whole numbers as they like.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


def whole(value: Any) -> Any:
    """A float without a fraction as the integer that it is; anything else as it came."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(whole)]


class BodyPart(BaseModel):
    """A part of a body: strict about types, and null where there is a default is the same as nothing."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        required = {field.alias or name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: each for name, each in value.items() if each is not None or name in required}


class Carried(BodyPart):
    """A part of a conversation. What no chat template reads changes nothing, so unknown fields are left out."""

    model_config = ConfigDict(extra="ignore")


def is_empty(value: Any) -> bool:
    """Whether a value that was given asks for nothing: null, an empty text, list or object, or an object of such."""
    values = value.values() if isinstance(value, dict) else [value]
    return all(each is None or each in ("", [], {}) for each in values)
