"""A key of a recipe: one dataclass field with its meaning, and a check that says what is wrong with a value."""

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

REQUIRED: Any = object()  # stands where a recipe must give a value


@dataclass(frozen=True)
class Check:
    """Says what is wrong with a value of the right type, or None; `schema` is the same for JSON Schema."""

    problem: Callable[[Any], str | None]
    schema: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, value: Any) -> str | None:
        return self.problem(value)


def key(meaning: str, default: Any = REQUIRED, check: Callable[[Any], str | None] | None = None) -> Any:
    """A recipe key: `check` returns what is wrong with a value of the right type, or None."""
    metadata = {"meaning": meaning, "check": check}
    return field(metadata=metadata) if default is REQUIRED else field(default=default, metadata=metadata)


def keys(table: Any) -> dict[str, Field[Any]]:
    """The fields of a table, or of its class, by the name of their key: a field `from_` is the key `from`."""
    return {item.name.removesuffix("_"): item for item in fields(table)}


def one_of(*choices: str) -> Check:
    return Check(lambda value: None if value in choices else f"must be one of {', '.join(choices)}", {"enum": choices})


def between(low: float, high: float) -> Check:
    message = f"must be from {low} to {high}"
    return Check(lambda value: None if low <= value <= high else message, {"minimum": low, "maximum": high})


at_least_one = between(1, 2**31)
