"""Logged: what an answer leaves in the request log, put together from its pieces while they are sent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterhub_local.base.tool_calls import Call
from adapterhub_local.data.answer_log import ANSWER, now
from serve.answers.models import Target
from serve.errors import BadParameter
from serve.log.log import RequestLog
from serve.requests.generation import ChatRequest, GenerationRequest
from serve.requests.messages import arguments_object
from serve.requests.metadata import check_metadata
from serve.text.generate import Generation, Piece

SAMPLING = (  # of the engine's parameters
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("max_tokens", "min_tokens", "seed", "stop", "logit_bias"),
)
SHAPING = {  # what else of a request shapes its answer, as it was given
    *("tool_choice", "parallel_tool_calls", "response_format", "structured_outputs", "reasoning_effort"),
    *("thinking_token_budget", "max_thinking_tokens", "chat_template_kwargs", "add_generation_prompt", "parse_special"),
}


def is_logged(log: RequestLog | None, body: GenerationRequest) -> bool:
    """Whether the answer to a request is to be logged. Raises BadParameter about metadata that cannot be."""
    if log is None or not isinstance(body, ChatRequest):
        return False
    if body.store:
        check_metadata(body.metadata)
    return bool(body.store) or log.logs_all


@dataclass
class _Choice:
    """One answer as far as it has come."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    finish_reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The answer as a message, in the form in which chat templates get it."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self.texts)}
        if self.thoughts:
            message["reasoning_content"] = "".join(self.thoughts)
        if self.calls:
            calls = [{"id": call.id, "type": "function", "function": _function(call)} for call in self.calls]
            message["tool_calls"] = calls
        return {"message": message, "finish_reason": self.finish_reason}


class Recorder:
    """What listens to the pieces of one answer, and has it logged when all of its choices have ended.

    An answer whose client left before, or which failed, is not whole and not logged.
    """

    def __init__(self, log: RequestLog, body: ChatRequest, target: Target, generation: Generation,
                 head: Mapping[str, Any]) -> None:  # fmt: skip
        self._log = log
        self._body = body
        self._target = target
        self._generation = generation
        self._head = head  # id of the answer, key and id of the request
        self._choices = [_Choice() for _ in generation.requests]
        self._num_open = len(generation.requests)

    def __call__(self, piece: Piece) -> None:
        """Take note of a piece; behind the last of all, hand the answer over."""
        choice = self._choices[piece.index]
        # texts, not pieces: Python's collector would go through all that are kept, again and again
        if piece.text:
            choice.texts.append(piece.text)
        if piece.thought:
            choice.thoughts.append(piece.thought)
        if piece.calls:
            choice.calls += piece.calls
        if piece.finish_reason is not None:
            choice.finish_reason = piece.finish_reason
            self._num_open -= 1
            if not self._num_open:
                num_prompt = len(self._generation.requests[0].prompt)
                self._log.append(num_prompt + self._generation.num_completion_tokens, self.record)

    def record(self) -> dict[str, Any]:
        """The line of the log. Not for the event loop: it is as long as the conversation."""
        body, target, params = self._body, self._target, self._generation.requests[0].params
        usage = self._generation.usage(body.num_choices)
        found = {
            "kind": ANSWER,
            "id": self._head["id"],
            "key": self._head["key"],
            "num_choices": len(self._choices),
            "time": now(),
            "request_id": self._head["request_id"],
            "is_asked": bool(body.store),
            "model": target.model,
            "adapter": str(target.version) if target.version is not None else None,
            "digest": target.version.content_digest if target.version is not None else None,
            "base": {"name": target.base.name, "fingerprint": target.base.fingerprint},
            "messages": [message.for_template() for message in body.messages],
            "tools": [tool.model_dump(exclude_none=True) for tool in body.callable_tools],
            "begins_answer": body.begins_answer,
            "continues": body.continues,
            "parameters": {name: getattr(params, name) for name in SAMPLING}
            | body.model_dump(include=SHAPING, exclude_defaults=True, by_alias=True),
            "choices": [choice.to_json() for choice in self._choices],
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "metadata": body.metadata,
        }
        if not body.store and body.metadata is not None:  # its sender did not mean it for a log: not all of it fits
            try:
                check_metadata(body.metadata)
            except BadParameter as error:
                found |= {"metadata": None, "metadata_left_out": str(error)}
        return found


def _function(call: Call) -> dict[str, Any]:
    return {"name": call.name, "arguments": arguments_object(call.arguments)}
