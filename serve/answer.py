"""Answers as OpenAI's clients expect them: whole bodies and chunks of both endpoints. Plain dictionaries."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from serve.engine.request import Sampled
from serve.errors import ErrorBody
from serve.generate import Generation, Piece
from serve.models import Target
from serve.tools import Call


@dataclass(frozen=True)
class Answer:
    """What all parts of one answer carry: id, time, model, and exactly which weights made it.

    `num_choices` are asked for each prompt. `echoes`: the text that each choice of a completion begins with, or none.
    """

    target: Target
    is_chat: bool
    tokenizer: PreTrainedTokenizerBase
    num_choices: int = 1
    has_logprobs: bool = False
    has_usage: bool = False  # in a stream
    echoes: Sequence[str] = ()
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    end: str = "data: [DONE]\n\n"

    def whole(self, pieces: Sequence[Piece], generation: Generation) -> dict[str, Any]:
        """The body of an answer that is not streamed, from all of its pieces."""
        choices = []
        for index in sorted({piece.index for piece in pieces}):
            own = [piece for piece in pieces if piece.index == index]
            text = "".join(piece.text for piece in own)
            calls = [_call(call) for piece in own for call in piece.calls]
            said: dict[str, Any]
            if self.is_chat:
                message = {"role": "assistant", "content": text or None if calls else text}
                said = {"message": message | ({"tool_calls": calls} if calls else {})}
            else:
                said = {"text": (self.echoes[index] if self.echoes else "") + text}
            logprobs = self.logprobs([piece.sampled for piece in own if piece.sampled])
            choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": own[-1].finish_reason})
        return self._body("chat.completion" if self.is_chat else "text_completion", choices) | {
            "usage": generation.usage(self.num_choices)
        }

    async def events(self, generation: Generation) -> AsyncIterator[str]:
        """The chunks of an answer that is streamed."""
        usage = {"usage": None} if self.has_usage else {}
        lengths = [0] * len(generation.requests)
        if self.is_chat:
            for index in range(len(generation.requests)):
                yield _event(self.first_chunk(index) | usage)
        async for piece in generation.pieces():
            if piece.text or piece.calls or piece.finish_reason or (piece.sampled and self.has_logprobs):
                yield _event(self.chunk(piece, lengths[piece.index]) | usage)
            lengths[piece.index] += len(piece.text)
        if self.has_usage:
            yield _event(self._chunk() | {"usage": generation.usage(self.num_choices)})

    def error_event(self, error: ErrorBody) -> str:
        """What ends a stream that cannot go on."""
        return f"data: {json.dumps(error.to_json())}\n\n"  # escaped: what an error quotes may be half a character

    def first_chunk(self, index: int) -> dict[str, Any]:
        """The chunk that opens a choice of a chat."""
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def chunk(self, piece: Piece, text_offset: int = 0) -> dict[str, Any]:
        """One piece as a chunk; `text_offset` is the length of the choice's text before it."""
        said: dict[str, Any] = {"text": piece.text}
        if self.is_chat:
            delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
            if piece.calls:
                delta["tool_calls"] = [{"index": call.index, **_call(call)} for call in piece.calls]
            said = {"delta": delta}
        logprobs = self.logprobs([piece.sampled], text_offset) if piece.sampled else None
        return self._chunk({"index": piece.index, **said, "logprobs": logprobs, "finish_reason": piece.finish_reason})

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return self._body("chat.completion.chunk" if self.is_chat else "text_completion", list(choices))

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.target.model,
            "system_fingerprint": self.target.fingerprint,
            "adapter": self.target.adapter,
            "choices": choices,
        }

    def logprobs(self, sampled: Sequence[Sampled], text_offset: int = 0) -> dict[str, Any] | None:
        """Log-probabilities of tokens as the endpoint gives them; None if they were not asked for."""
        if not self.has_logprobs:
            return None
        known = [one for one in sampled if one.logprob is not None]
        if self.is_chat:
            return {
                "content": [
                    {
                        **self._token(one.token, one.logprob),
                        "top_logprobs": [self._token(*alternative) for alternative in one.top_logprobs],
                    }
                    for one in known
                ],
                "refusal": None,
            }
        texts = [self._spelling(one.token) for one in known]
        offsets = [text_offset + sum(map(len, texts[:index])) for index in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in known],
            "top_logprobs": [{self._spelling(token): logprob for token, logprob in one.top_logprobs} for one in known],
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._spelling(token)
        # a token may be a part of a character, whose bytes its spelling does not tell
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": data}

    def _spelling(self, token: int) -> str:
        text = self.tokenizer.decode([token])
        assert isinstance(text, str)
        return text


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
