"""Rows that cannot be used: counted by kind and reported together, or left out where the recipe says so."""

from dataclasses import dataclass, field

from adapterhub_local.counts import counted
from adapterhub_local.errors import BadData

MOST = 12  # kinds of trouble that one message lists


@dataclass
class Troubles:
    """What is wrong with some of `total` examples of one file or part, by kind."""

    what: str  # what the examples are of
    total: int = 0
    kinds: dict[str, list[str]] = field(default_factory=dict)  # what is wrong -> where

    def add(self, where: str, error: BadData) -> None:
        text = str(error)
        kind = text.removeprefix(where).lstrip(": ") if text.startswith(where) else text
        self.kinds.setdefault(kind, []).append(where)

    @property
    def count(self) -> int:
        return sum(map(len, self.kinds.values()))

    def raise_if(self, bad_rows: str) -> None:
        """Raise BadData with every kind, unless there is none, or `bad_rows` is "skip" and something is left."""
        if not self.kinds or (bad_rows == "skip" and self.count < self.total):
            return
        hint = "data.bad_rows = 'skip' leaves them out" if self.count < self.total else ""
        if len(self.kinds) == 1:
            ((kind, where),) = self.kinds.items()
            share = (
                f" ({len(where):,} of {self.total:,} examples{f'; {hint}' if hint else ''})" if self.total > 1 else ""
            )
            raise BadData(f"{_at(where[0], kind)}{share}")
        lines = [
            _at(where[0], kind) + (f" ({counted(len(where), 'example')})" if len(where) > 1 else "")
            for kind, where in list(self.kinds.items())[:MOST]
        ]
        hidden = len(self.kinds) - MOST
        more = f", and {counted(hidden, 'more kind', 'more kinds')} of mistake" if hidden > 0 else ""
        total = f"{self.what}: {self.count:,} of {self.total:,} examples cannot be used{more}"
        raise BadData("\n".join([*lines, f"{total}: {hint}" if hint else total]))

    @property
    def notes(self) -> list[str]:
        """What was left out, a sentence for each kind."""
        return [
            f"{self.what}: {len(where):,} of {self.total:,} examples left out (data.bad_rows): {kind}; "
            f"the first is {where[0]}"
            for kind, where in self.kinds.items()
        ]


def _at(where: str, kind: str) -> str:
    return f"{where}{' ' if kind.startswith(('is ', 'has ')) else ': '}{kind}"
