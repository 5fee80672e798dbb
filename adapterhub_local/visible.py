"""Text from elsewhere made safe to look at: what a terminal would obey, or what hides or reorders letters, is shown.

A name of ESC, a carriage return or a right-to-left override can repaint a screen, forge a line or turn a word round;
here it becomes the escape that Python and JSON write for it, such as `\\x1b` and `\\u202e`.
"""

import re

# C0 and C1 controls, DEL, lone surrogates, and what has no shape of its own but changes that of others: marks and
# overrides of direction (https://unicode.org/reports/tr9), separators of lines, spaces of no width, tags.
# Not the joiners U+200C and U+200D, which Persian, Hindi and emoji are written with.
_INVISIBLE = (
    "\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb"
    "\\ud800-\\udfff\\U000e0000-\\U000e007f"
)
_TEXT = re.compile(f"[{_INVISIBLE}]")
_LINE = re.compile(f"[{_INVISIBLE}\\t\\n]")


def visible(text: str) -> str:
    """`text` of any number of lines; line ends and tabs stay as they are."""
    return _TEXT.sub(_escaped, text.replace("\r\n", "\n"))


def visible_line(text: str) -> str:
    """`text` as one line: line ends and tabs become escapes too."""
    return _LINE.sub(_escaped, text)


def visible_json(text: str) -> str:
    """JSON that means the same, with JSON's own escapes for what is not visible."""
    return _TEXT.sub(lambda match: "".join(f"\\u{unit:04x}" for unit in _utf16(match[0])), text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def _utf16(letter: str) -> list[int]:
    raw = letter.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(raw[at : at + 2], "big") for at in range(0, len(raw), 2)]
