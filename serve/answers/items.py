"""Items: answers as POST /v1/responses gives them, a body or a stream of typed events. Plain dictionaries."""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub_local.base.tool_calls import Call
from serve.answers.completions import Answer
from serve.answers.events import line
from serve.engine.request import Sampled
from serve.errors import ErrorBody
from serve.requests.responses import ResponsesRequest
from serve.text.generate import Generation, Piece

INCOMPLETE = {"length": "max_output_tokens"}  # finish reason -> why the answer is not whole


@dataclass
class ItemAnswer:
    """One answer as items; `chat` is the same answer as a chat's, which knows the weights and spells tokens."""

    chat: Answer
    asked: ResponsesRequest
    keep: Callable[[dict[str, Any]], None] | None = None  # stores the body, if it is to be
    end: str = ""  # the last event says that it is the last
    media_type: str = "text/event-stream"
    _num_events: int = 0

    @property
    def answer_id(self) -> str:
        """The id that its client sees."""
        return f"resp_{self.chat.ids.answer}"

    def whole(self, pieces: Sequence[Piece], generation: Generation) -> dict[str, Any]:
        """The body of an answer that is not streamed, from all of its pieces."""
        text = "".join(piece.text for piece in pieces)
        calls = [call for piece in pieces for call in piece.calls]
        thought = "".join(piece.thought for piece in pieces)
        first = next((place for place, piece in enumerate(pieces) if piece.text), len(pieces)) if thought else 0
        sampled = [piece.sampled for piece in pieces[first:] if piece.sampled]
        reason = pieces[-1].finish_reason
        items = [_thought_item(self._new("rs"), thought)] if thought else []
        items += [self._message(self._new("msg"), text, sampled, reason)] if text or not (calls or thought) else []
        items += [_call_item(self._new("fc"), call) for call in calls]
        return self._kept(self._body(generation, items, reason))

    async def events(self, generation: Generation) -> AsyncIterator[str]:
        """The events of an answer: items open, grow and close one after the other."""
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self._body(generation, []))
        items: list[dict[str, Any]] = []
        message_id, text, sampled, reason = "", "", [], None
        thought_id, thought = "", ""
        async for piece in generation.pieces():
            reason = piece.finish_reason
            if piece.sampled:
                sampled.append(piece.sampled)
            if piece.thought:
                if not thought_id:
                    thought_id = self._new("rs")
                    for event in self._thought_opened(thought_id, len(items)):
                        yield event
                thought += piece.thought
                place = {"item_id": thought_id, "output_index": len(items), "content_index": 0}
                yield self._event("response.reasoning_text.delta", **place, delta=piece.thought)
            if thought_id and (piece.text or piece.calls or reason):
                items.append(_thought_item(thought_id, thought))
                for event in self._thought_closed(items[-1], len(items) - 1):
                    yield event
                thought_id, sampled = "", [piece.sampled] if piece.text and piece.sampled else []
            if piece.text:
                if not message_id:
                    message_id = self._new("msg")
                    for event in self._opened(message_id, len(items)):
                        yield event
                text += piece.text
                place = {"item_id": message_id, "output_index": len(items), "content_index": 0}
                logprobs = self._logprobs([piece.sampled] if piece.sampled else [])
                yield self._event("response.output_text.delta", **place, delta=piece.text, logprobs=logprobs)
            if message_id and (piece.calls or reason):
                items.append(self._message(message_id, text, sampled, reason))
                for event in self._closed(items[-1], len(items) - 1):
                    yield event
                message_id, text, sampled = "", "", []
            for call in piece.calls:
                items.append(_call_item(self._new("fc"), call))
                for event in self._called(items[-1], len(items) - 1):
                    yield event
        if not items:  # an answer of no tokens is a message, too
            for event in self._opened(message_id := self._new("msg"), 0):
                yield event
            items.append(self._message(message_id, "", sampled, reason))
            for event in self._closed(items[0], 0):
                yield event
        body = self._kept(self._body(generation, items, reason))
        yield self._event(f"response.{body['status']}", response=body)

    def error_event(self, error: ErrorBody) -> str:
        """What ends a stream that cannot continue: flat as documented, and nested, which is what the client raises."""
        fields = {"code": error.code or error.type, "message": error.message, "param": error.param}
        return self._event("error", **fields, **error.to_json())

    def _opened(self, item_id: str, index: int) -> Iterator[str]:
        item = {"id": item_id, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=index, item=item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        place = {"item_id": item_id, "output_index": index, "content_index": 0}
        yield self._event("response.content_part.added", **place, part=part)

    def _closed(self, item: dict[str, Any], index: int) -> Iterator[str]:
        (part,) = item["content"]
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        fields = {"text": part["text"], "logprobs": part["logprobs"]}
        yield self._event("response.output_text.done", **place, **fields)
        yield self._event("response.content_part.done", **place, part=part)
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _thought_opened(self, item_id: str, index: int) -> Iterator[str]:
        item = _thought_item(item_id, "") | {"content": [], "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=index, item=item)
        place = {"item_id": item_id, "output_index": index, "content_index": 0}
        yield self._event("response.content_part.added", **place, part={"type": "reasoning_text", "text": ""})

    def _thought_closed(self, item: dict[str, Any], index: int) -> Iterator[str]:
        (part,) = item["content"]
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        yield self._event("response.reasoning_text.done", **place, text=part["text"])
        yield self._event("response.content_part.done", **place, part=part)
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _called(self, item: dict[str, Any], index: int) -> Iterator[str]:
        """A call is known when it is whole, so its arguments come in one piece."""
        begun = item | {"arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        place = {"item_id": item["id"], "output_index": index}
        yield self._event("response.function_call_arguments.delta", **place, delta=item["arguments"])
        done = {"name": item["name"], "arguments": item["arguments"]}
        yield self._event("response.function_call_arguments.done", **place, **done)
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _message(self, item_id: str, text: str, sampled: Sequence[Sampled], reason: str | None) -> dict[str, Any]:
        status = "incomplete" if reason in INCOMPLETE else "completed"
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs(sampled)}
        return {"id": item_id, "type": "message", "role": "assistant", "status": status, "content": [part]}

    def _new(self, kind: str) -> str:
        return f"{kind}_{self.chat.ids.new()}"

    def _logprobs(self, sampled: Sequence[Sampled]) -> list[dict[str, Any]]:
        found = self.chat.logprobs(sampled)
        return found["content"] if found else []

    def _kept(self, body: dict[str, Any]) -> dict[str, Any]:
        """A body that is complete, stored before its client can speak of it."""
        if self.keep is not None:
            self.keep(body)
        return body

    def _body(self, generation: Generation, items: list[dict[str, Any]], reason: str | None = None) -> dict[str, Any]:
        """The response as it stands; without a reason it is in progress."""
        asked, why, params = self.asked, INCOMPLETE.get(reason or ""), generation.requests[0].params
        status = "incomplete" if why else "completed" if reason else "in_progress"
        return {
            "id": self.answer_id,
            "object": "response",
            "created_at": int(self.chat.created),
            "status": status,
            "error": None,
            "incomplete_details": {"reason": why} if why else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.chat.target.model,
            "system_fingerprint": self.chat.target.fingerprint,
            "adapter": self.chat.target.adapter,
            "output": items,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning is not None else None, "summary": None},
            "store": self.keep is not None,
            "temperature": params.temperature,
            "text": {"format": (asked.text and asked.text.format) or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": _usage(generation) if reason else None,
            "user": asked.user,
        }

    def _event(self, kind: str, **fields: Any) -> str:
        value = {"type": kind, **fields, "sequence_number": self._num_events}
        self._num_events += 1
        return f"event: {kind}\ndata: {line(value)}\n\n"


def _usage(generation: Generation) -> dict[str, Any]:
    counts = generation.usage(1)
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": counts["prompt_tokens_details"],
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": counts["completion_tokens_details"],
        "total_tokens": counts["total_tokens"],
    }


def _thought_item(item_id: str, text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": item_id, "type": "reasoning", "summary": [], "content": content, "status": "completed"}


def _call_item(item_id: str, call: Call) -> dict[str, Any]:
    fields = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
    return {"id": item_id, "type": "function_call", "status": "completed", **fields}
