"""Answers as POST /v1/messages gives them: a message of blocks, or a stream of typed events. Plain dictionaries."""

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub_local.base.tool_calls import Call
from serve.answers.completions import Answer
from serve.answers.events import line
from serve.errors import ErrorBody
from serve.text.generate import Generation, Piece

REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


@dataclass
class BlockAnswer:
    """One answer as blocks; `chat` is the same answer as a chat's."""

    chat: Answer
    end: str = ""  # the last event says that it is the last
    media_type: str = "text/event-stream"

    @property
    def answer_id(self) -> str:
        """The id that its client sees."""
        return f"msg_{self.chat.ids.answer}"

    def whole(self, pieces: Sequence[Piece], generation: Generation) -> dict[str, Any]:
        """The body of an answer that is not streamed, from all of its pieces."""
        thought, text = "".join(piece.thought for piece in pieces), "".join(piece.text for piece in pieces)
        calls = [call for piece in pieces for call in piece.calls]
        blocks = [_thought(thought)] if thought else []
        blocks += [{"type": "text", "text": text, "citations": None}] if text else []
        blocks += [_call(call) for call in calls]
        return self._message(blocks, generation) | _end(pieces[-1]) | {"usage": _usage(generation)}

    async def events(self, generation: Generation) -> AsyncIterator[str]:
        """The events of an answer: blocks open, grow and close one after the other."""
        index, kind, is_begun = -1, "", False
        async for piece in generation.pieces():
            if not is_begun:  # what of the prompt was known before is known with the first token
                is_begun = True
                message = self._message([], generation) | {"stop_reason": None, "stop_sequence": None}
                yield _event("message_start", message=message | {"usage": _usage(generation, 1)})
            for part, text in (("thinking", piece.thought), ("text", piece.text)):
                if not text:
                    continue
                if kind != part:
                    if kind:
                        yield _event("content_block_stop", index=index)
                    index, kind = index + 1, part
                    block = _thought("") if part == "thinking" else {"type": "text", "text": "", "citations": None}
                    yield _event("content_block_start", index=index, content_block=block)
                yield _event("content_block_delta", index=index, delta={"type": f"{part}_delta", part: text})
            for call in piece.calls:
                if kind:
                    yield _event("content_block_stop", index=index)
                index, kind = index + 1, ""
                for event in _called(call, index):
                    yield event
            if piece.finish_reason:
                if kind:
                    yield _event("content_block_stop", index=index)
                yield _event("message_delta", delta=_end(piece), usage=_usage(generation))
                yield _event("message_stop")

    def error_event(self, error: ErrorBody) -> str:
        """What ends a stream that cannot continue."""
        return f"event: error\ndata: {json.dumps(error.to_json('/v1/messages'))}\n\n"

    def _message(self, blocks: list[dict[str, Any]], generation: Generation) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "type": "message",
            "role": "assistant",
            "model": self.chat.target.model,
            "system_fingerprint": self.chat.target.fingerprint,
            "adapter": self.chat.target.adapter,
            "content": blocks,
        }


def _called(call: Call, index: int) -> Iterator[str]:
    """A call is known when it is whole, so its input comes in one piece."""
    yield _event("content_block_start", index=index, content_block=_call(call) | {"input": {}})
    delta = {"type": "input_json_delta", "partial_json": call.arguments}
    yield _event("content_block_delta", index=index, delta=delta)
    yield _event("content_block_stop", index=index)


def _call(call: Call) -> dict[str, Any]:
    value = json.loads(call.arguments)
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": value if isinstance(value, dict) else {}}


def _thought(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": ""}


def _end(piece: Piece) -> dict[str, Any]:
    reason = "stop_sequence" if piece.stop else REASONS.get(piece.finish_reason or "", "end_turn")
    return {"stop_reason": reason, "stop_sequence": piece.stop}


def _usage(generation: Generation, num_output: int | None = None) -> dict[str, Any]:
    """Token counts; what was found in the cache is not among the input tokens here."""
    counts = generation.usage(1)
    cached = counts["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": counts["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": counts["completion_tokens"] if num_output is None else num_output,
    }


def _event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {line({'type': kind, **fields})}\n\n"
