"""Anthropic's way to ask, POST /v1/messages, read as the chat request that it amounts to."""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from adapterhub_local.data.blocks import FAILED
from serve.requests.body_part import BodyPart, Carried, Whole
from serve.requests.generation import ChatRequest
from serve.requests.messages import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, FunctionName
from serve.requests.translated import translated
from serve.requests.unsupported import refuse_unsupported

# what /v1/chat/completions calls otherwise
NAMES = {"stop": "stop_sequences", "response_format": "output_config", "thinking_token_budget": "thinking"}
SAMPLING = ("model", "temperature", "top_p", "top_k", "stream")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# who pays, where it runs, what is kept: beside what no endpoint's answer depends on
IGNORED = ("betas", "cache_control", "diagnostics", "inference_geo", "speed", "user_profile_id", "workspace_id")


class Text(Carried):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Thought(Carried):
    """What an earlier answer thought."""

    type: Literal["thinking"]
    thinking: str


class HiddenThought(Carried):
    """The same, encrypted by another server: nobody here can read it."""

    type: Literal["redacted_thinking"]


class Use(Carried):
    """A call that an earlier answer made."""

    type: Literal["tool_use"]
    id: str
    name: FunctionName
    input: dict[str, Any]


class Result(Carried):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[Text], Field(max_length=MAX_PARTS, fail_fast=True)] = ""
    is_error: bool = False

    @property
    def text(self) -> str:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return f"{FAILED}{text}" if self.is_error else text


Texts = Annotated[list[Text], Field(max_length=MAX_PARTS, fail_fast=True)]
Part = Annotated[Text | Thought | HiddenThought | Use | Result, Field(discriminator="type")]


class Turn(Carried):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]


class AnthropicTool(Carried):
    """A function that the answer may call."""

    type: Literal["custom"] = "custom"
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]


class Choice(Carried):
    """Whether a tool is to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Carried):
    """Whether to think, and how long at most."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Whole | None = Field(None, ge=0)


class OutputConfig(BodyPart):
    """What the answer looks like, and how hard to think about it."""

    model_config = ConfigDict(extra="forbid")
    format: dict[str, Any] | None = None
    effort: str | None = None


class Metadata(Carried):
    """Whose request it is."""

    user_id: str | None = None


class CountRequest(BodyPart):
    """POST /v1/messages/count_tokens: what a request's prompt would cost."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: str | Texts | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "CountRequest":
        extra = {name: value for name, value in (self.model_extra or {}).items() if name not in IGNORED}
        refuse_unsupported(extra, type(self).model_fields)
        return self

    def chat(self) -> ChatRequest:
        """The chat request that this is. Raises ValidationError in this request's own names."""
        return translated(ChatRequest, self._body(), NAMES)

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "messages": self._turns()}
        if self.tools:
            body["tools"] = [
                {"type": "function", "function": {
                    "name": tool.name, "description": tool.description, "parameters": tool.input_schema}}
                for tool in self.tools
            ]  # fmt: skip
        if (choice := self.tool_choice) is not None:
            forced = {"type": "function", "function": {"name": choice.name or ""}}
            body["tool_choice"] = forced if choice.type == "tool" else CHOICES[choice.type]
            if choice.disable_parallel_tool_use is not None:
                body["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        if self.thinking is not None:
            body["thinking_token_budget"] = 0 if self.thinking.type == "disabled" else self.thinking.budget_tokens
        if self.output_config is not None:
            body["reasoning_effort"] = self.output_config.effort
            if (form := self.output_config.format) is not None:
                if form.get("type") != "json_schema":
                    message = "its format is of type json_schema"
                    raise PydanticCustomError("unknown_form", message, {"param": "output_config"})
                body["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}
        return body

    def _turns(self) -> list[dict[str, Any]]:
        """The conversation; results of calls stand before what the user says with them."""
        turns: list[dict[str, Any]] = []
        if self.system:
            turns.append({"role": "system", "content": _text(self.system)})
        for turn in self.messages:
            parts: list[Any] = [Text(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
            results = [part for part in parts if isinstance(part, Result)]
            turns += [{"role": "tool", "tool_call_id": each.tool_use_id, "content": each.text} for each in results]
            calls = [
                {"id": part.id, "function": {"name": part.name, "arguments": json.dumps(part.input)}}
                for part in parts
                if isinstance(part, Use)
            ]
            texts = [part for part in parts if isinstance(part, Text)]
            if results and not texts:
                continue
            message: dict[str, Any] = {"role": turn.role, "content": _text(texts)}
            if calls:
                message["tool_calls"] = calls
            if thought := "".join(part.thinking for part in parts if isinstance(part, Thought)):
                message["reasoning_content"] = thought
            turns.append(message)
        if turns and turns[-1]["role"] == "assistant" and not turns[-1].get("tool_calls"):
            turns[-1]["prefix"] = True  # an answer that was begun is gone on with
        return turns


class AnthropicRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Whole = Field(ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    stop_sequences: Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None

    def chat(self) -> ChatRequest:
        """The chat request that this is. Raises ValidationError in this request's own names."""
        body = {name: getattr(self, name) for name in SAMPLING} | self._body()
        body |= {"stop": self.stop_sequences, "max_completion_tokens": self.max_tokens}
        body["user"] = self.metadata.user_id if self.metadata is not None else None
        return translated(ChatRequest, body, NAMES | {"max_completion_tokens": "max_tokens"}).clamped()


def _text(content: str | list[Text]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
