"""Regular expressions of an adapter's config, which a stranger may have written: matched in linear time only.

RE2 (https://github.com/google/re2) never backtracks. What it cannot express (lookarounds, back references) and what it
reads otherwise than Python's `re`, which PEFT uses, is refused, so that a pattern means here what it means to PEFT.
"""

import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Generic, TypeVar

V = TypeVar("V")
MAX_LENGTH = 10_000  # characters; a pattern that names each of 200 layers has 6,000
MAX_DEPTH = 100  # of parentheses
MAX_PATTERNS = 100_000  # of one setting; a mixture of experts has 40,000 modules
MAX_TOTAL = 100_000  # characters of those that are not names
MAX_WORK = 3_000_000  # comparisons for one adapter, about 2 seconds
_MATCH_WORK = 10  # comparisons that one match of a regular expression counts for
# a name whose dots are escaped or stand for any character, as `re.escape` and as PEFT's EVA write it
_NAME = re.compile(r"\^?(?:[\w.-]|\\[.-])+\$?", re.ASCII)
_AHEAD = re.compile(r"\(\?=((?:\\[.-]|[\w-]))\)\.\*", re.ASCII)  # `(?=\.).*` is `\..*`: ms-swift writes it


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> Any:
    """The pattern as an RE2 object. Raises ValueError with the reason why it is not taken."""
    import re2

    shown = pattern if len(pattern) <= 60 else f"{pattern[:60]}..."
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"the pattern {shown!r} has {len(pattern):,} characters, more than {MAX_LENGTH:,}")
    if _depth(pattern) > MAX_DEPTH:
        raise ValueError(f"the pattern {shown!r} has parentheses more than {MAX_DEPTH} deep")
    if "{," in pattern or "[[:" in pattern:  # RE2 reads a literal, and a class of POSIX
        raise ValueError(
            f"the pattern {shown!r} has '{{,' or '[[:', which engines read in different ways: spell it out"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)  # parsed, never matched: what RE2 takes beyond Python is not a pattern to PEFT
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"the pattern {shown!r} is not a regular expression: {error}") from None
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 16 << 20
    try:
        return re2.compile(_AHEAD.sub(r"\1.*", pattern), options)
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        raise ValueError(
            f"the pattern {shown!r} cannot be matched in linear time ({reason[:60]}): name the modules instead"
        ) from None
    except (UnicodeError, TypeError) as error:
        raise ValueError(f"the pattern {shown!r} is not a regular expression: {error}") from None


def matches_whole(pattern: str, name: str) -> bool:
    """Whether the pattern matches all of `name`, as PEFT reads `target_modules`."""
    return compile_pattern(pattern).fullmatch(name) is not None


def matches_end(pattern: str, name: str) -> bool:
    """Whether the pattern matches `name` or what follows a dot in it, as PEFT reads the keys of `rank_pattern`.

    Each dot's rest is tried by itself: the pattern stays as it was written, flags at its start included.
    """
    compiled = compile_pattern(pattern)
    starts = [0, *(at + 1 for at, letter in enumerate(name) if letter == ".")]
    return any(compiled.fullmatch(name, start) is not None for start in starts)


class PatternTable(Generic[V]):
    """Patterns for the ends of names -> values; the first in order that matches counts (PEFT's `get_pattern_key`).

    Patterns that are names are looked up, not tried one after the other: there may be one for each of 10,000 modules.
    Raises ValueError for a pattern that is not taken.
    """

    def __init__(self, values: Mapping[str, V]) -> None:
        # (length, where any character may be, whether the name is whole) -> the name, dots there -> its place, value
        self._names: dict[tuple[int, tuple[int, ...], bool], dict[str, tuple[int, V]]] = {}
        self._others: list[tuple[int, str, V]] = []
        if len(values) > MAX_PATTERNS:
            raise ValueError(f"{len(values):,} patterns are more than any adapter needs")
        others = [pattern for pattern in values if len(pattern) > MAX_LENGTH or not _NAME.fullmatch(pattern)]
        total = sum(map(len, others))
        if total > MAX_TOTAL or len(others) > MAX_TOTAL // 100:
            raise ValueError(f"{len(others):,} patterns of {total:,} characters are more than any adapter needs")
        for place, (pattern, value) in enumerate(values.items()):
            if len(pattern) <= MAX_LENGTH and _NAME.fullmatch(pattern):
                whole, text = pattern.startswith("^"), pattern.removeprefix("^").removesuffix("$")
                name = text.replace("\\", "")
                wild = tuple(_wild(text))
                self._names.setdefault((len(name), wild, whole), {}).setdefault(name, (place, value))
            else:
                compile_pattern(pattern)
                self._others.append((place, pattern, value))

    @property
    def work(self) -> int:
        """About how many comparisons one name takes."""
        return len(self._names) + _MATCH_WORK * len(self._others)

    @property
    def is_literal(self) -> bool:
        """Whether every pattern is a name, so that no engine can be slow on it."""
        return not self._others

    def get(self, name: str, default: V) -> V:
        """The value of the first pattern that matches the end of `name`."""
        found: tuple[int, V] | None = None
        for (length, wild, whole), values in self._names.items():
            start = len(name) - length
            if start < 0 or (start and (whole or name[start - 1] != ".")):
                continue
            end = name[start:]
            if any(end[at] != "." for at in wild):
                letters = list(end)
                for at in wild:
                    letters[at] = "."
                end = "".join(letters)
            here = values.get(end)
            if here is not None and (found is None or here[0] < found[0]):
                found = here
        for place, pattern, value in self._others:
            if found is not None and found[0] < place:
                break
            if matches_end(pattern, name):
                return value
        return default if found is None else found[1]


def _wild(text: str) -> list[int]:
    """The positions of dots that are not escaped, in the name without its backslashes."""
    if "\\" not in text:
        return [at for at, letter in enumerate(text) if letter == "."]
    positions, at, escaped = [], 0, False
    for letter in text:
        if letter == "\\" and not escaped:
            escaped = True
            continue
        if letter == "." and not escaped:
            positions.append(at)
        at, escaped = at + 1, False
    return positions


def _depth(pattern: str) -> int:
    """How deep its parentheses are nested, at most; those in classes and escaped ones count too where unsure."""
    deepest = depth = 0
    escaped = False
    for letter in pattern:
        if escaped:
            escaped = False
        elif letter == "\\":
            escaped = True
        elif letter == "(":
            depth += 1
            deepest = max(deepest, depth)
        elif letter == ")":
            depth -= 1
    return deepest
