"""Names, references and mixes: parsed once, at the edge, into frozen values that print back the same.

    sentiment                      the newest version        sentiment@latest
    sentiment@3                    that version              sentiment@v3
    sentiment@prod                 what the alias points to
    sentiment@sha256:ab12...       that content or manifest digest (12 hex digits or more)
    sql@prod*0.7+tone*0.3          a mix: a weighted sum

Knows nothing of storage: whether a reference exists is the registry's business.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from adapterhub_local.errors import BadReference

MAX_NAME_LENGTH = 128
MAX_NUMBER = 2**31 - 1  # of a version
_PART = r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?"
_NAME = re.compile(rf"{_PART}(?:/{_PART})?")
_ALIAS = re.compile(_PART)
_VERSION = re.compile(r"v?([0-9]+)")
_DIGEST = re.compile(r"sha256:([0-9a-f]{12,64})")
_WEIGHT = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


def check_name(name: str) -> str:
    """`name`, if it may name an adapter or a base.

    Raises BadReference. Lower-case letters, digits, `.`, `_`, `-`, and one `/` for a namespace;
    each part starts and ends with a letter or digit, so `..` and hidden files cannot be named.
    """
    if len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name) or ".." in name:
        raise BadReference(
            f"'{_shown(name)}' is not a name: use lower-case letters, digits, '.', '_', '-' "
            f"and at most one '/', up to {MAX_NAME_LENGTH} characters"
        )
    return name


def check_alias(alias: str) -> str:
    """`alias`, if it may be one. Raises BadReference; `latest`, digits and `v<n>` are reserved."""
    if alias == "latest" or _VERSION.fullmatch(alias):
        raise BadReference(f"'{_shown(alias)}' is reserved and cannot be an alias: choose another word, such as 'prod'")
    if len(alias) > MAX_NAME_LENGTH or not _ALIAS.fullmatch(alias) or ".." in alias:
        raise BadReference(f"'{_shown(alias)}' is not an alias: use lower-case letters, digits, '.', '_' and '-'")
    return alias


@dataclass(frozen=True)
class Reference:
    """One version of one adapter, as a person names it; at most one of the last three is set."""

    name: str
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """The reference that `text` spells. Raises BadReference."""
        name, at, selector = text.partition("@")
        check_name(name)
        if not at or selector == "latest":
            return cls(name)
        if match := _VERSION.fullmatch(selector):
            number = int(match[1]) if len(match[1]) <= 10 else 0
            if not 1 <= number <= MAX_NUMBER:
                raise BadReference(f"'{_shown(text)}': versions are numbered from 1")
            return cls(name, version=number)
        if match := _DIGEST.fullmatch(selector):
            return cls(name, digest=match[0])
        try:
            return cls(name, alias=check_alias(selector))
        except BadReference:
            raise BadReference(
                f"'{_shown(text)}' is not a reference: write name, name@3, name@prod or name@sha256:<12 or more digits>"
            ) from None

    def __str__(self) -> str:
        selector = self.version or self.alias or self.digest
        return f"{self.name}@{selector}" if selector else self.name


@dataclass(frozen=True)
class Mix:
    """A weighted sum of references, in the order written."""

    terms: tuple[tuple[Reference, float], ...]

    @classmethod
    def parse(cls, text: str) -> "Mix":
        """The mix that `text` spells; a plain reference is a mix of one with weight 1. Raises BadReference."""
        terms = []
        for term in text.split("+"):
            reference, star, weight = term.partition("*")
            terms.append((Reference.parse(reference), parse_weight(weight) if star else 1.0))
        return cls(tuple(terms))

    @property
    def is_single(self) -> bool:
        return len(self.terms) == 1 and self.terms[0][1] == 1.0

    def __str__(self) -> str:
        return str(self.terms[0][0]) if self.is_single else spelled(self.terms)


def spelled(terms: Iterable[tuple[object, float]]) -> str:
    """Terms and their weights as a mix is written."""
    # 1e+16 is written 1e16, since '+' separates terms
    return "+".join(f"{term}*{repr(weight).replace('e+', 'e')}" for term, weight in terms)


def parse_weight(text: str) -> float:
    """A finite weight. Raises BadReference for anything else, `nan` and `inf` included."""
    number = text.strip()  # of more than `float` strips, such as U+001F
    if not _WEIGHT.fullmatch(number) or not math.isfinite(weight := float(number)):
        raise BadReference(f"'{_shown(text)}' is not a weight: write a finite number such as 0.7 or -0.5")
    return weight


def _shown(text: str) -> str:
    """`text` made safe and short for a message."""
    safe = text.encode("unicode_escape").decode()
    return safe if len(safe) <= 80 else safe[:77] + "..."
