"""Ollama's two small languages, so written that no text can leave its place: Modelfile commands, Go template text.

A value in a Modelfile (parser/parser.go of https://github.com/ollama/ollama) ends at the next three quotes; it has no
escapes, and characters that do not print are dropped from it. A Go template ends its text at two braces.
"""

import re

QUOTES = '"""'
_HAZARDS = re.compile(r'[^\n -~]+|[{}"]+')  # in runs: each run is one constant


def command(name: str, value: str) -> str | None:
    """One command with a quoted value, such as `TEMPLATE` or `PARAMETER stop`; None if the value cannot be quoted."""
    prints = all(char == "\n" or " " <= char <= "~" or (ord(char) > 0xA0 and char.isprintable()) for char in value)
    if QUOTES in value or value.startswith('"') or value.endswith('"') or not prints:
        return None
    return f"{name} {QUOTES}{value}{QUOTES}"


def go_text(text: str) -> str:
    """`text` as a piece of a Go template that renders as exactly that, whatever stands beside it.

    Braces and quotes that could end something, and what does not print, become string constants.
    """
    return _HAZARDS.sub(lambda found: f'{{{{ "{"".join(map(_escape, found[0]))}" }}}}', text)


def _escape(char: str) -> str:
    return f"\\U{ord(char):08x}"
