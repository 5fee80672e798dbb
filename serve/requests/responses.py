"""Responses: OpenAI's newer way to ask, POST /v1/responses, read as the chat request that it amounts to.

Nothing is stored, so what points to earlier answers is refused: the whole conversation comes as input.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from serve.requests.generation import ChatRequest
from serve.requests.messages import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, STRICT, FunctionName

# what /v1/chat/completions calls otherwise
NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
}
SAMPLING = ("model", "temperature", "top_p", "user", "parallel_tool_calls", "stream")
LOGPROBS = "message.output_text.logprobs"
# Parameters that would need stored answers or other machines than this one, with the values that ask for nothing.
ABSENT: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "logprobs": (),
    "max_tool_calls": (),
    "n": (1,),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({"effort": "none"},),
    "truncation": ("disabled",),
}
STATEFUL = ("conversation", "previous_response_id")


class Part(BaseModel):
    """A part of a message; answers come back with what their parts had beside the text."""

    model_config = STRICT
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]


class MessageItem(BaseModel):
    """A message of the conversation."""

    model_config = STRICT
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(BaseModel):
    """A call that an earlier answer made; clients send fields of answers back as null."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str


class ResultItem(BaseModel):
    """What a call gave."""

    model_config = STRICT
    type: Literal["function_call_output"]
    call_id: str
    output: str | Parts
    id: str | None = None
    status: str | None = None


class FunctionTool(BaseModel):
    """A function that the answer may call."""

    model_config = STRICT
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextForm(BaseModel):
    """`text`: what the answer looks like."""

    model_config = STRICT
    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(BaseModel):
    """POST /v1/responses. Parameters that are not named here are those of /v1/chat/completions."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    input: (
        str
        | Annotated[
            list[MessageItem | CallItem | ResultItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
        ]
    )
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextForm | None = None
    include: list[str] | None = Field(None, max_length=64, fail_fast=True)
    metadata: dict[str, str] | None = None
    user: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _refuse_absent(self) -> "ResponsesRequest":
        for name, value in (self.model_extra or {}).items():
            if name in NAMES:
                raise PydanticCustomError("unknown", f"it is called {NAMES[name]} here", {"param": name})
            says_nothing = value is None or (isinstance(value, dict) and not any(value.values()))
            if name in ABSENT and not says_nothing and value not in ABSENT[name]:
                hint = "answers are not stored: send the whole conversation as input"
                message = hint if name in STATEFUL else "this parameter is not supported: leave it out"
                raise PydanticCustomError("unsupported", message, {"param": name})
        return self

    def chat(self) -> ChatRequest:
        """The chat request that this is. Raises ValidationError in this request's own names."""
        body: dict[str, Any] = {name: getattr(self, name) for name in SAMPLING}
        body |= {name: value for name, value in (self.model_extra or {}).items() if name not in ABSENT}
        body["messages"] = self._messages()
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
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as error:
            lines = [_renamed(line) for line in error.errors(include_url=False)]
            raise ValidationError.from_exception_data("ResponsesRequest", lines) from None

    def _messages(self) -> list[dict[str, Any]]:
        """The conversation; calls belong to the assistant's message before them."""
        turns: list[dict[str, Any]] = []
        if self.instructions is not None:
            turns.append({"role": "system", "content": self.instructions})
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for item in items:
            match item:
                case MessageItem():
                    turns.append({"role": item.role, "content": _text(item.content)})
                case ResultItem():
                    turns.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
                case CallItem():
                    if not turns or turns[-1]["role"] != "assistant":
                        turns.append({"role": "assistant", "content": None})
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


def _renamed(line: Any) -> Any:
    """An error's line about the parameter as this request calls it."""
    first, *rest = line["loc"] or ("",)
    loc = (NAMES.get(first, first), *rest) if line["loc"] else ()
    context = dict(line.get("ctx", {}))
    if "param" in context:
        context["param"] = NAMES.get(context["param"], context["param"])
    kind = PydanticCustomError(line["type"], line["msg"], context or None)
    return {"type": kind, "loc": loc, "input": line["input"]}
