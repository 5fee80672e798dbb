"""Answers as /api/chat and /api/generate give them: one object, or a line of JSON a piece. Plain dictionaries."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from serve.answers.completions import Answer
from serve.answers.events import line
from serve.errors import ErrorBody
from serve.text.generate import Generation, Piece


@dataclass
class LineAnswer:
    """One answer as lines; `chat` is the same answer as a chat's."""

    chat: Answer
    is_chat: bool = True
    started: float = field(default_factory=time.monotonic)
    end: str = ""
    media_type: str = "application/x-ndjson"

    @property
    def answer_id(self) -> str:
        """That of the chat's answer: lines have none, but a header may name it."""
        return self.chat.answer_id

    def whole(self, pieces: Sequence[Piece], generation: Generation) -> dict[str, Any]:
        """The body of an answer that is not streamed, from all of its pieces."""
        return self._line(pieces) | self._done(pieces[-1], generation)

    async def events(self, generation: Generation) -> AsyncIterator[str]:
        """A line for each piece, and a last one with the counts."""
        async for piece in generation.pieces():
            if piece.text or piece.thought or piece.calls:
                yield line(self._line([piece]) | {"done": False}) + "\n"
            if piece.finish_reason:
                yield line(self._line([]) | self._done(piece, generation)) + "\n"

    def error_event(self, error: ErrorBody) -> str:
        """What ends a stream that cannot continue."""
        return json.dumps(error.to_json("/api/")) + "\n"

    @property
    def _created_at(self) -> str:
        return datetime.fromtimestamp(self.chat.created, UTC).isoformat()

    def _line(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        text, thought = ("".join(getattr(piece, part) for piece in pieces) for part in ("text", "thought"))
        found: dict[str, Any] = {"model": self.chat.target.model, "created_at": self._created_at}
        thinking = {"thinking": thought} if thought else {}
        if not self.is_chat:
            return found | {"response": text} | thinking
        calls = [
            {
                "id": call.id,
                "function": {"index": call.index, "name": call.name, "arguments": _arguments(call.arguments)},
            }
            for piece in pieces
            for call in piece.calls
        ]
        message = {"role": "assistant", "content": text} | thinking | ({"tool_calls": calls} if calls else {})
        return found | {"message": message}

    def _done(self, last: Piece, generation: Generation) -> dict[str, Any]:
        """Why it ended and what it cost; times in nanoseconds."""
        now, counts = time.monotonic(), generation.usage(1)
        first = generation.times[0] if generation.times else now
        return {
            "done": True,
            "done_reason": "length" if last.finish_reason == "length" else "stop",
            "total_duration": _nanoseconds(now - self.started),
            "load_duration": 0,
            "prompt_eval_count": counts["prompt_tokens"],
            "prompt_eval_duration": _nanoseconds(first - self.started),
            "eval_count": counts["completion_tokens"],
            "eval_duration": _nanoseconds(now - first),
            "adapter": self.chat.target.adapter,
        }


def loaded(model: str) -> dict[str, Any]:
    """The answer to a request without a prompt, which only names a model."""
    created_at = datetime.now(UTC).isoformat()
    return {"model": model, "created_at": created_at, "response": "", "done": True, "done_reason": "load"}


def _arguments(text: str) -> dict[str, Any]:
    value = json.loads(text)
    return value if isinstance(value, dict) else {}


def _nanoseconds(seconds: float) -> int:
    return max(0, int(seconds * 1e9))
