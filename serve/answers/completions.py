"""Answers as OpenAI's clients expect them: whole bodies and chunks of both endpoints. Plain dictionaries."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterhub_local.base.tool_calls import Call
from serve.answers.events import line
from serve.answers.logprobs import Echo, Spell, joined, of_chat, of_completion, of_echo, of_prompt
from serve.answers.models import Target
from serve.engine.request import Sampled
from serve.errors import ErrorBody
from serve.requests.begun import Ids
from serve.text.generate import Generation, Piece


@dataclass(frozen=True)
class Answer:
    """What all parts of one answer carry: id, time, model, and exactly which weights made it.

    `num_choices` are asked for each prompt. `echoes`: what each choice of a completion begins with, or none.
    `num_alternatives` beside the log-probability of each token, or None: no log-probabilities; `prompt_logprobs` is
    the same for the prompt, in vLLM's way.
    """

    target: Target
    is_chat: bool
    spell: Spell
    num_choices: int = 1
    num_alternatives: int | None = None
    prompt_logprobs: int | None = None
    has_usage: bool = False  # at the end of a stream
    repeats_usage: bool = False  # in each chunk of one
    has_thoughts: bool = True  # where there are any
    echoes: Sequence[Echo] = ()
    ids: Ids = field(default_factory=Ids)
    created: float = field(default_factory=time.time)  # seconds since 1970
    end: str = "data: [DONE]\n\n"
    media_type: str = "text/event-stream"

    @property
    def answer_id(self) -> str:
        """The id that its client sees."""
        return f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.ids.answer}"

    def whole(self, pieces: Sequence[Piece], generation: Generation) -> dict[str, Any]:
        """The body of an answer that is not streamed, from all of its pieces."""
        choices = []
        for index in sorted({piece.index for piece in pieces}):
            own = [piece for piece in pieces if piece.index == index]
            text = "".join(piece.text for piece in own)
            calls = [_call(call) for piece in own for call in piece.calls]
            content: dict[str, Any]
            echo, echoed = self._echo(index, generation)
            if self.is_chat:
                message = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
                thought = "".join(piece.thought for piece in own)
                if thought and self.has_thoughts:
                    message["reasoning_content"] = thought
                content = {"message": message | ({"tool_calls": calls} if calls else {})}
            else:
                content = {"text": echo.text + text}
            logprobs = joined(echoed, self._logprobs_of(own, len(echo.text)))
            choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": own[-1].finish_reason})
        body = self._body("chat.completion" if self.is_chat else "text_completion", choices)
        for place, index in ((body, 0),) if self.is_chat else [(choice, choice["index"]) for choice in choices]:
            place |= self._prompt_logprobs(index, generation)
        return body | {"usage": generation.usage(self.num_choices)}

    async def events(self, generation: Generation) -> AsyncIterator[str]:
        """The chunks of an answer that is streamed."""
        lengths: dict[int, int] = {}  # of the texts of the choices that have begun
        if self.is_chat:
            for index in range(len(generation.requests)):
                yield _event(self.first_chunk(index) | self._usage(generation))
        async for piece in generation.pieces():
            if piece.index not in lengths:
                echo, logprobs = await asyncio.to_thread(self._echo, piece.index, generation)
                lengths[piece.index] = len(echo.text)
                if echo.text or logprobs:
                    content = {"text": echo.text, "logprobs": logprobs, "finish_reason": None}
                    yield _event(self._chunk({"index": piece.index, **content}) | self._usage(generation))
            if (
                piece.text
                or piece.calls
                or (piece.thought and self.has_thoughts)
                or piece.finish_reason
                or (piece.sampled and self.num_alternatives is not None)
            ):
                yield _event(self.chunk(piece, lengths[piece.index]) | self._usage(generation))
            lengths[piece.index] += len(piece.text)
        if self.has_usage:
            yield _event(self._chunk() | {"usage": generation.usage(self.num_choices)})

    def _usage(self, generation: Generation) -> dict[str, Any]:
        """What a chunk says of usage."""
        if self.repeats_usage:
            return {"usage": generation.usage(self.num_choices)}
        return {"usage": None} if self.has_usage else {}

    def error_event(self, error: ErrorBody) -> str:
        """What ends a stream that cannot continue."""
        return f"data: {json.dumps(error.to_json())}\n\n"  # escaped: what an error quotes may be half a character

    def first_chunk(self, index: int) -> dict[str, Any]:
        """The chunk that opens a choice of a chat."""
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def chunk(self, piece: Piece, text_offset: int = 0) -> dict[str, Any]:
        """One piece as a chunk; `text_offset` is the length of the choice's text before it."""
        content: dict[str, Any] = {"text": piece.text}
        if self.is_chat:
            delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
            if piece.thought and self.has_thoughts:
                delta["reasoning_content"] = piece.thought
            if piece.calls:
                delta["tool_calls"] = [{"index": call.index, **_call(call)} for call in piece.calls]
            content = {"delta": delta}
        logprobs = self._logprobs_of([piece], text_offset) if piece.sampled or piece.end else None
        return self._chunk(
            {"index": piece.index, **content, "logprobs": logprobs, "finish_reason": piece.finish_reason}
        )

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return self._body("chat.completion.chunk" if self.is_chat else "text_completion", list(choices))

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "object": kind,
            "created": int(self.created),
            "model": self.target.model,
            "system_fingerprint": self.target.fingerprint,
            "adapter": self.target.adapter,
            "choices": choices,
        }

    def logprobs(self, sampled: Sequence[Sampled], offsets: Sequence[int] = ()) -> dict[str, Any] | None:
        """Log-probabilities of tokens as the endpoint gives them; None if they were not asked for."""
        if self.num_alternatives is None:
            return None
        return of_chat(sampled, self.spell) if self.is_chat else of_completion(sampled, offsets, self.spell)

    def _logprobs_of(self, pieces: Sequence[Piece], text_offset: int) -> dict[str, Any] | None:
        """Those of one choice's pieces. A completion's are of the token that ended it, too, as OpenAI's and vLLM's."""
        found, offsets = [], []
        for piece in pieces:
            if one := piece.sampled or (None if self.is_chat else piece.end):
                found.append(one)
                offsets.append(text_offset if piece.sampled else text_offset + len(piece.text))
            text_offset += len(piece.text)
        return self.logprobs(found, offsets)

    def _echo(self, index: int, generation: Generation) -> tuple[Echo, dict[str, Any] | None]:
        """What a choice begins with, and its log-probabilities. Its first token must have come."""
        if not self.echoes:
            return Echo(), None
        echo, prompt = self.echoes[index], generation.requests[index].prompt
        if self.num_alternatives is None:
            return echo, None
        return echo, of_echo(prompt, generation.prompts[index].scores, echo, self.num_alternatives, self.spell)

    def _prompt_logprobs(self, index: int, generation: Generation) -> dict[str, Any]:
        if self.prompt_logprobs is None:
            return {}
        prompt, scores = generation.requests[index].prompt, generation.prompts[index].scores
        return {"prompt_logprobs": of_prompt(prompt, scores, self.prompt_logprobs, self.spell)}


def _event(value: dict[str, Any]) -> str:
    return f"data: {line(value)}\n\n"


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
