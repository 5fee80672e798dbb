"""Events: one line of JSON that no reader of lines cuts, and what every form of an answer can do."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # it loads torch, which a gateway does without
    from serve.errors import ErrorBody
    from serve.text.generate import Generation, Piece

# What some readers take for the end of a line, though JSON allows it in texts: U+0085, U+2028 and U+2029.
_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def line(value: Any) -> str:
    """A value as one line of JSON, whoever reads lines."""
    return json.dumps(value, ensure_ascii=False).translate(_BREAKS)


class AnswerForm(Protocol):
    """An answer in the form of its endpoint."""

    @property
    def answer_id(self) -> str:
        """The id under which it may be spoken of."""
        ...

    @property
    def end(self) -> str:
        """What is sent last, if the last event does not say that it is."""
        ...

    @property
    def media_type(self) -> str:
        """What a stream of it is."""
        ...

    def whole(self, pieces: Sequence[Piece], generation: Generation) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ...

    def events(self, generation: Generation) -> AsyncIterator[str]:
        """What is sent of one that is."""
        ...

    def error_event(self, error: ErrorBody) -> str:
        """What ends a stream that cannot continue."""
        ...
