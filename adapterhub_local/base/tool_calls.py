"""Calls of tools in the text of an answer, read while it comes: one reader for the server and for evaluation."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterhub_local.base.tool_format import ToolFormat


@dataclass(frozen=True)
class Call:
    """One call, as the model wrote it; `arguments` is a JSON text."""

    index: int
    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class CallReader:
    """The text of one answer while it comes, split into text and calls."""

    def __init__(
        self, tool_format: ToolFormat, names: Sequence[str], *, is_parallel: bool = True, must_call: bool = False
    ) -> None:
        self.calls: list[Call] = []
        self._begin, self._end, self._key = tool_format.begin.strip(), tool_format.end.strip(), tool_format.key
        self._names = frozenset(names)
        self._is_parallel = is_parallel
        self._must_call = must_call
        self._held = ""
        self._is_inside = False
        self._has_text = False
        self._is_after_call = False  # blanks that only stand between calls are nobody's words

    def push(self, text: str) -> str:
        """The text that is certain now that `text` has come; calls are added to `calls` when they are whole."""
        self._held += text
        plain = ""
        while self._held:
            before = self._held
            plain += self._inside() if self._is_inside else self._outside()
            if self._held == before:
                break
        return plain

    def flush(self, *, is_cut: bool = False) -> str:
        """The rest, after the last text.

        An unfinished call is given out as it stands, unless the answer `is_cut` or has called: then it is no text that
        was meant for anybody.
        """
        held, self._held = self._held, ""
        if not self._is_inside:
            is_mark = self._must_call or 2 * len(held) > len(self._begin) > 0
            return "" if is_cut and is_mark else held
        self._is_inside = False
        if not self._begin and self._read(held):
            return ""
        return "" if is_cut or self.calls else self._begin + held

    def _outside(self) -> str:
        """What stands before a call."""
        if not self._begin:  # a call is the whole answer or nothing
            self._is_inside = self._held.lstrip().startswith("{") and not self._has_text
            if self._is_inside or not self._held.strip():
                return ""
            plain, self._held = self._held, ""
            self._has_text = True
            return plain
        if self._is_after_call:
            self._held = self._held.lstrip()
            self._is_after_call = not self._held
        plain, found, rest = self._held.partition(self._begin)
        self._is_inside = bool(found)
        size = 0 if found else overlap(plain, self._begin)
        self._held = rest if found else plain[len(plain) - size :]
        return plain[: len(plain) - size]

    def _inside(self) -> str:
        if not self._begin:
            return ""  # it ends with the answer
        body, found, rest = self._held.partition(self._end)
        if not found:
            return ""
        self._held, self._is_inside = rest, False
        self._is_after_call = self._read(body)
        return "" if self._is_after_call else f"{self._begin}{body}{self._end}"

    def _read(self, text: str) -> bool:
        """Note the call that `text` is. False if it is none, or of a tool that was not offered."""
        try:
            value: Any = json.loads(text)
        except (ValueError, RecursionError):
            return False
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return False
        if self._is_parallel or not self.calls:
            arguments = value.get(self._key, value.get("arguments", {}))
            self.calls.append(Call(len(self.calls), name, json.dumps(arguments, ensure_ascii=False)))
        return True


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
