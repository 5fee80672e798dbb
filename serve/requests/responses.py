"""Responses: OpenAI's newer way to ask, POST /v1/responses, read as the chat request that it amounts to.

What it says of earlier answers by their ids is looked up first, see `ResponsesRequest.conversation`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, PydanticSerializationError, to_json

from serve.errors import BadParameter
from serve.requests.body_part import BodyPart, Carried, Whole, is_empty
from serve.requests.generation import ChatRequest
from serve.requests.messages import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, FunctionName, TextPart
from serve.requests.translated import translated

# what /v1/chat/completions calls otherwise
NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}
SAMPLING = ("model", "temperature", "top_p", "user", "parallel_tool_calls", "stream")
LOGPROBS = "message.output_text.logprobs"
# Parameters that would need stored conversations or other machines than this one, with the values that ask for nothing.
ABSENT: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "logprobs": (),
    "n": (1,),
    "prompt": (),
    "truncation": ("disabled",),
}
UNSUPPORTED = "this parameter is not supported: leave it out"
NO_CONVERSATIONS = "conversations are not stored: use previous_response_id, or send all of it as input"


class Part(TextPart):
    """A part of a message; answers come back with what their parts had beside the text, which changes nothing."""


Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]


class Remembered(Carried):
    """An item of the conversation; answers' have an id, by which a later request may speak of them."""

    id: Any = None


class MessageItem(Remembered):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts


class CallItem(Remembered):
    """A call that an earlier answer made; clients send fields of answers back as null."""

    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str


class ResultItem(Remembered):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Parts


class Thought(Carried):
    """A part of what an earlier answer thought, or of its summary."""

    type: str = "reasoning_text"
    text: str


class ThoughtItem(Remembered):
    """What an earlier answer thought. What another server encrypted nobody here can read."""

    type: Literal["reasoning"]
    content: Annotated[list[Thought], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ())


class ReferenceItem(Carried):
    """An item that is stored here, by its id."""

    type: Literal["item_reference"]
    id: str


Item = MessageItem | CallItem | ResultItem | ThoughtItem


class Memory(Protocol):
    """What is stored of earlier answers. Both raise BadParameter for what is not."""

    def conversation(self, response_id: str) -> Sequence[Item]:
        """Everything up to the end of an answer."""

    def item(self, item_id: str) -> Item:
        """One item of an answer, or of what it answered."""


class FunctionTool(Carried):
    """A function that the answer may call."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextForm(BodyPart):
    """`text`: what the answer looks like."""

    model_config = ConfigDict(extra="forbid")
    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium"] | None = None


class Reasoning(BodyPart):
    """`reasoning`: how hard to think. Summaries are never made: the thoughts themselves are given back."""

    model_config = ConfigDict(extra="allow")
    effort: str | None = None


class ResponsesRequest(BodyPart):
    """POST /v1/responses. Parameters that are not named here are those of /v1/chat/completions."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: str | Annotated[list[Item | ReferenceItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    previous_response_id: str | None = Field(None, description="the stored answer that this request goes on from")
    store: bool | None = Field(None, description="false: the answer is not stored")
    max_output_tokens: Whole | None = Field(None, description="-1 is all there is room for", ge=-1)
    reasoning: Reasoning | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Whole | None = Field(None, ge=0)
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextForm | None = None
    include: list[str] | None = Field(None, max_length=64, fail_fast=True)
    metadata: dict[str, str] | None = None
    user: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_halves(cls, value: Any) -> Any:
        """Half of a surrogate pair is not text, and what is given back and stored must be."""
        for name, each in value.items() if isinstance(value, dict) else ():
            try:
                to_json([name, each])
            except PydanticSerializationError:
                message = "a text has half of a surrogate pair, which is not text"
                raise PydanticCustomError("value_error", message, {"param": str(name)[:80]}) from None  # type: ignore[arg-type]
        return value

    @model_validator(mode="after")
    def _refuse_absent(self) -> "ResponsesRequest":
        for name, value in (self.model_extra or {}).items():
            if name in NAMES:
                raise PydanticCustomError("unknown", f"it is called {NAMES[name]} here", {"param": name})
            if name in ABSENT and not is_empty(value) and value not in ABSENT[name]:
                message = NO_CONVERSATIONS if name == "conversation" else UNSUPPORTED
                raise PydanticCustomError("unsupported", message, {"param": name})
        return self

    def conversation(self, memory: Memory) -> list[Item]:
        """All items that are to be answered, those included that are only spoken of. Raises BadParameter.

        Each of these once: a small body would stand for as much text as it likes.
        """
        items = list(memory.conversation(self.previous_response_id)) if self.previous_response_id else []
        given = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        seen = {item.id for item in items}
        for item in given:
            if not isinstance(item, ReferenceItem):
                # its id is the client's word, which must not stand for what is stored under it
                items.append(item.model_copy(update={"id": None}))
                continue
            if item.id in seen:
                raise BadParameter(f"item '{item.id[:80]}' comes twice", "input")
            seen.add(item.id)
            items.append(memory.item(item.id))
        return items

    def chat(self, conversation: Sequence[Item]) -> ChatRequest:
        """The chat request that this is. Raises ValidationError in this request's own names."""
        body: dict[str, Any] = {name: getattr(self, name) for name in SAMPLING}
        body |= {name: value for name, value in (self.model_extra or {}).items() if name not in ABSENT}
        body["messages"] = self._messages(conversation)
        if self.reasoning is not None:
            body["reasoning_effort"] = self.reasoning.effort
        body["max_completion_tokens"] = self.max_output_tokens
        if self.tools:
            body["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
                for tool in self.tools
            ]
        body["tool_choice"] = self.tool_choice
        if isinstance(self.tool_choice, dict) and self.tool_choice.keys() == {"type", "name"}:
            body["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice["name"]}}
        if self.text is not None and self.text.format is not None:
            body["response_format"] = _response_format(self.text.format)
        if LOGPROBS in (self.include or ()) or self.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return translated(ChatRequest, body, NAMES)

    def _messages(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        """The conversation; calls belong to the assistant's message before them."""
        turns: list[dict[str, Any]] = []
        if self.instructions is not None:
            turns.append({"role": "system", "content": self.instructions})
        thoughts = ""  # of the answer that comes next
        for item in items:
            match item:
                case ThoughtItem():
                    thoughts = item.text
                case MessageItem():
                    turns.append({"role": item.role, "content": _text(item.content)})
                    if item.role == "assistant" and thoughts:
                        turns[-1]["reasoning_content"], thoughts = thoughts, ""
                case ResultItem():
                    turns.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
                case CallItem():
                    if not turns or turns[-1]["role"] != "assistant":
                        turns.append({"role": "assistant", "content": None, "reasoning_content": thoughts or None})
                        thoughts = ""
                    function = {"name": item.name, "arguments": item.arguments}
                    turns[-1].setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
        return turns


def _text(content: str | Sequence[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _response_format(form: dict[str, Any]) -> dict[str, Any]:
    """A form as /v1/chat/completions nests it."""
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}
