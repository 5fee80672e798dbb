"""Numbers agree with what they count: no message says `1 examples`."""

import ast
import re
from pathlib import Path

import pytest

from adapterhub_local.counts import counted

ROOT = Path(__file__).parent.parent / "adapterhub_local"
SEVERAL = re.compile(
    r" (?:\w+ )?(?:examples|chats|answers|rows|tokens|steps|messages|columns|pieces|prompts|mistakes|turns)\b"
)


def test_counted() -> None:
    """One of a thing is singular, none and several are plural, with separators of thousands."""
    assert [counted(number, "answer") for number in (0, 1, 2000)] == ["0 answers", "1 answer", "2,000 answers"]
    assert counted(2, "more kind of mistake", "more kinds of mistake") == "2 more kinds of mistake"
    assert counted(1, "more kind of mistake", "more kinds of mistake") == "1 more kind of mistake"


def is_set(value: ast.expr) -> bool:
    """Whether it is a constant or a limit that a person sets, which is more than 1."""
    return (
        ast.unparse(value).isupper() or ast.unparse(value).endswith("max_length") or "per_second" in ast.unparse(value)
    )


@pytest.mark.parametrize("room", ["rows", "data", "train", "evaluate"])
def test_numbers_agree_with_their_nouns(room: str) -> None:
    """A message puts no plural behind a number that may be 1, unless it says `1 of 3 examples`."""
    found = []
    for path in sorted((ROOT / room).rglob("*.py")):
        for text in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(text, ast.JoinedStr):
                continue
            before = ""
            for part, after in zip(text.values, text.values[1:], strict=False):
                said = after.value if isinstance(after, ast.Constant) else ""
                if isinstance(part, ast.FormattedValue) and SEVERAL.match(str(said)) and not is_set(part.value):
                    found += [] if before.endswith("of ") else [f"{path.name}:{part.lineno}: {str(said)[:40]}"]
                before = str(part.value) if isinstance(part, ast.Constant) else ""
    assert not found
