"""How large a form may be that an answer has to have: nesting, literals, and what repetitions spell out.

Each check takes time linear in its input. What they let through is compiled by a process of its own, which may die of
it; what they refuse would hold up the step of every request later, while the answer is made.
"""

import re
from collections.abc import Mapping
from typing import Any

from serve.errors import BadParameter

MAX_FORM = 1_000_000  # characters of a whole grammar
MAX_DEPTH = 100  # of a schema; llguidance's own reader of JSON ends at 128, tools lie some levels deeper
MAX_LITERAL = 50_000  # characters: what is forced is looked through at once
MAX_SPELLED = 50_000  # characters that the repetitions of a pattern spell out, beside its own
_HUGE = 10**12
# An escape, a class, a group's begin or end, a repetition. What is not closed goes on to the end: to look for its end
# again from every place would take quadratic time.
_PATTERN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]?|[()]|\{(\d+)(?:,\d*)?\}", re.DOTALL)
# a comment, a literal, a pattern, a group's begin or end, a repetition, a name
_RULE = re.compile(
    r"//[^\n]*|\"(?:\\.|[^\"\\\n])*\"?i?|/(?!/)(?:\\.|[^/\\\n])+/?[imslux]*|[()\[\]]"
    r"|\{(\d+)(?:,\d*)?\}|~\s*(?P<count>\d+)|(?P<name>[A-Za-z_]\w*)"
)
_DEFINITION = re.compile(r"^[ \t]*[?!]?([A-Za-z_]\w*)(?:\.-?\d+)?(?:\[[^\]\n]*\])?[ \t]*:", re.MULTILINE)


def bound_schema(schema: Mapping[str, Any], param: str) -> None:
    """Raise BadParameter about a schema that is nested too deeply, or that has a literal or a pattern too large."""
    open_parts: list[tuple[Any, int]] = [(schema, 1)]
    while open_parts:
        part, depth = open_parts.pop()
        if depth > MAX_DEPTH:
            raise BadParameter(f"a schema may be nested {MAX_DEPTH} levels deep, this one is nested deeper", param)
        if isinstance(part, dict):
            for key, value in part.items():
                _bound_literal(key, param)
                if key == "pattern" and isinstance(value, str):
                    bound_pattern(value, param)
                if key == "patternProperties" and isinstance(value, dict):
                    for pattern in value:
                        bound_pattern(pattern, param)
                open_parts.append((value, depth + 1))
        elif isinstance(part, list):
            open_parts.extend((value, depth + 1) for value in part)
        elif isinstance(part, str):
            _bound_literal(part, param)


def bound_choices(choices: list[str], param: str) -> None:
    """Raise BadParameter about a text that is too long to be one of several."""
    for choice in choices:
        _bound_literal(choice, param)


def bound_pattern(pattern: str, param: str) -> None:
    """Raise BadParameter if the repetitions of a regular expression spell out too much."""
    _bound_spelled(_spelled(_PATTERN, pattern, {}), len(pattern), param)


def bound_rules(grammar: str, param: str) -> None:
    """The same for the rules of a Lark grammar, whose repetitions multiply through names."""
    starts = list(_DEFINITION.finditer(grammar))
    ends = [*(start.start() for start in starts[1:]), len(grammar)][: len(starts)]
    bodies = {start[1]: grammar[start.end() : end] for start, end in zip(starts, ends, strict=True)}
    names = {
        name: {m["name"] for m in _RULE.finditer(body) if m["name"]} & bodies.keys() for name, body in bodies.items()
    }
    sizes: dict[str, int] = {}
    for first in bodies:
        path, on_path = [(first, iter(names[first]))], {first}
        while path:
            name, rest = path[-1]
            following = next((each for each in rest if each not in sizes and each not in on_path), None)
            if following is not None:
                path.append((following, iter(names[following])))
                on_path.add(following)
                continue
            path.pop()
            on_path.discard(name)
            if name not in sizes:  # what refers back to itself counts once
                sizes[name] = _spelled(_RULE, bodies[name], sizes)
                is_terminal = name.isupper()
                _bound_spelled(sizes[name], len(grammar), param)
                sizes[name] = sizes[name] if is_terminal else 1


def bound_form(grammar: str, param: str) -> None:
    """Raise BadParameter about a form that is too long as a whole."""
    if len(grammar) > MAX_FORM:
        message = f"a form may have {MAX_FORM:,} characters, this one has {len(grammar):,}"
        raise BadParameter(message, param)


def _bound_literal(text: str, param: str) -> None:
    if len(text) > MAX_LITERAL:
        message = f"a literal of a form may have {MAX_LITERAL:,} characters, one here has {len(text):,}"
        raise BadParameter(message, param)


def _bound_spelled(size: int, length: int, param: str) -> None:
    if size > length + MAX_SPELLED:
        message = f"the repetitions of a pattern may spell out {MAX_SPELLED:,} characters, these spell out more"
        raise BadParameter(message, param)


def _spelled(tokens: re.Pattern[str], text: str, sizes: Mapping[str, int]) -> int:
    """How many characters `text` has once its repetitions are spelled out, each as often as it must be.

    `sizes` are those of the names in it.
    """
    outer: list[int] = []
    total, last, end = 0, 1, 0
    for match in tokens.finditer(text):
        gap = text[end : match.start()]
        if gap and not (tokens is _RULE and gap.isspace()):
            total, last = total + len(gap), 1
        end, part = match.end(), match[0]
        count = match[1] or match.groupdict().get("count")
        if part == "(" or (part == "[" and tokens is _RULE):
            outer.append(total)
            total, last = 0, 0
        elif part in (")", "]"):
            last = total
            total += outer.pop() if outer else 0
        elif count is not None:
            times = int(count) if len(count) < 10 else _HUGE
            grown = min(_HUGE, last * max(1, times))
            total, last = min(_HUGE, total + grown - last), grown
        elif part.startswith("/") and tokens is _RULE and not part.startswith("//"):
            last = _spelled(_PATTERN, part[1 : part.rindex("/")], {})
            total = min(_HUGE, total + last)
        elif not part.startswith("//"):
            last = sizes.get(part, len(part) if part.startswith('"') else 1)
            total = min(_HUGE, total + last)
    return min(_HUGE, total + len(text) - end)
