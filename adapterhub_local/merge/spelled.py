"""A method with its settings as one text, as options and forms have it: `ties density=0.2 rank=16`. No torch."""

from typing import Any

from adapterhub_local.errors import InputError
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.methods import find_method, parameters
from adapterhub_local.merge.rank_rule import parse_rule

RULES = {"rank": int, "energy": float, "max_error": float}


def parse_formula(text: str) -> Formula:
    """The formula that a text spells: the method, then settings in any order. Raises InputError."""
    method, *words = text.split()[:40] or [""]
    find_method(method)
    given: dict[str, Any] = {}
    rules: dict[str, Any] = {}
    known = parameters()
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value or (name not in known and name not in RULES):
            every = ", ".join([*known, *RULES])
            raise InputError(f"'{word[:80]}' is not a setting of a merge: write NAME=VALUE, NAME one of {every}")
        if name in given or name in rules:
            raise InputError(f"{name} stands twice in '{text[:80]}': give it once")
        kind = RULES[name] if name in RULES else next(iter(known[name].values())).kind
        try:
            (rules if name in RULES else given)[name] = kind(value)
        except ValueError:
            raise InputError(f"{name} is '{value[:40]}': write a {'whole ' if kind is int else ''}number") from None
    return Formula(method, given, rule=parse_rule(rules.get("rank"), rules.get("energy"), rules.get("max_error")))
