"""Bounds on figures as people write them: `exact_match>=0.8` bounds a score, `>=0.8` is its bound."""

import operator
import re
from dataclasses import dataclass

_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": operator.eq}
_FORM = re.compile(
    r"\s*([^\s<>=]{1,200}?)\s*(<=|>=|==|<|>|=)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*", re.ASCII
)


@dataclass(frozen=True)
class Bound:
    """What a figure must be, compared with a number; `operator` is <=, >=, <, > or =."""

    operator: str
    number: float

    def __str__(self) -> str:
        return f"{self.operator}{self.number:g}"

    def holds(self, value: float) -> bool:
        """Whether `value` is within the bound."""
        return bool(_COMPARE[self.operator](value, self.number))


def split_bound(text: str) -> tuple[str, Bound] | None:
    """What `text` bounds, and the bound; None if it is not of that form."""
    match = _FORM.fullmatch(text)
    if match is None or not match[1].isprintable():
        return None
    return match[1], Bound("=" if match[2] == "==" else match[2], float(match[3]))
