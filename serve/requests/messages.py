"""The parts of a chat request's body: messages, tools and the form of the answer, as OpenAI defines them."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serve.requests.body_part import BodyPart, Carried

# Lists end at their first mistake: a body of 4 MiB could have hundreds of thousands, of which one is reported.
MAX_MESSAGES = 4096
MAX_PARTS = 16_384  # of all messages together
MAX_CALLS = 1024
MAX_TOOLS = 128
FunctionName = Annotated[str, Field(min_length=1, max_length=256)]


class TextPart(Carried):
    """A part of a message; only text is read. A refusal is the assistant's."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _read_refusal(cls, value: Any) -> Any:
        is_refusal = isinstance(value, dict) and value.get("type") == "refusal"
        return {"type": "refusal", "text": value.get("refusal")} if is_refusal else value


def _as_text(value: Any) -> Any:
    """Arguments that came as the object that they are, in the JSON text that they are here."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


class FunctionCall(Carried):
    """A function's name and its arguments, a JSON text."""

    name: FunctionName
    arguments: Annotated[str, BeforeValidator(_as_text)] = "{}"


class ToolCall(Carried):
    """A call that an assistant's message made."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Carried):
    """One message of a conversation. What templates do not read of it, such as the fields of answers, is left out."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # for templates that show thoughts again
    refusal: str | None = None
    prefix: bool = False  # of the last message: go on with it, as Mistral and DeepSeek have it
    audio: None = None
    function_call: None = None

    @model_validator(mode="before")
    @classmethod
    def _read_other_names(cls, value: Any) -> Any:
        """Other servers' names of thoughts, and a name that is a number."""
        if not isinstance(value, dict):
            return value
        found = [value.get(name) for name in ("reasoning_content", "reasoning", "thinking")]
        return value | {"reasoning_content": next((each for each in found if each and isinstance(each, str)), None)}

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if self.content is None and self.role not in ("assistant", "tool"):
            raise PydanticCustomError("missing", f"a message of the {self.role} needs content", {"param": "messages"})
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("misplaced", "only the assistant calls tools", {"param": "messages"})
        return self

    @property
    def uses_tools(self) -> bool:
        return self.role == "tool" or bool(self.tool_calls)

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        if self.content is None and self.refusal and self.role == "assistant":
            text = self.refusal
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content is not None and self.role == "assistant":
            message["reasoning_content"] = self.reasoning_content
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function",
                 "function": {"name": call.function.name, "arguments": arguments_object(call.function.arguments)}}
                for call in self.tool_calls
            ]  # fmt: skip
        return message


def _bound_parts(value: Any) -> Any:
    """Raise PydanticCustomError about more parts than are looked at one by one."""
    contents = [each.get("content") for each in value if isinstance(each, dict)] if isinstance(value, list) else []
    num_parts = sum(len(content) for content in contents if isinstance(content, list))
    if num_parts > MAX_PARTS:
        message = "the messages may have {limit} parts together, these have {found}"
        context = {"param": "messages", "limit": MAX_PARTS, "found": num_parts}
        raise PydanticCustomError("too_long", message, context)  # type: ignore[arg-type]
    return value


Messages = Annotated[
    list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), BeforeValidator(_bound_parts)
]


class Function(Carried):
    """What a tool is called, does and takes; `parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Carried):
    """A function that the answer may call."""

    type: Literal["function"]
    function: Function


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class FunctionChoice(Carried):
    """A function by its name."""

    name: str


class ToolChoice(Carried):
    """The one tool that the answer has to call."""

    type: Literal["function"]
    function: FunctionChoice


class JsonSchema(BodyPart):
    """A named JSON schema."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BodyPart):
    """What the answer has to look like: any text, a JSON object, or JSON of a schema."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            message = "json_schema is needed for type json_schema, and for no other"
            raise PydanticCustomError("misplaced", message, {"param": "response_format"})
        return self

    @property
    def is_json(self) -> bool:
        return self.type != "text"

    @property
    def schema_of_answer(self) -> dict[str, Any]:
        """The JSON schema that the answer follows."""
        given = self.json_schema.schema_ if self.json_schema is not None else None
        return {"type": "object"} if given is None else given


class StructuredOutputs(BodyPart):
    """What the answer has to look like, in one of vLLM's ways: a schema, a pattern, some texts, or a Lark grammar."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    json_: dict[str, Any] | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = Field(None, min_length=1, max_length=10_000)
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, max_length=1000, fail_fast=True
    )
    grammar: str | None = Field(None, min_length=1, max_length=100_000)

    @model_validator(mode="after")
    def _check_one(self) -> "StructuredOutputs":
        if len(self.model_dump(exclude_none=True)) != 1:
            message = "one of json, json_object, regex, choice and grammar is needed, and only one"
            raise PydanticCustomError("misplaced", message, {"param": "structured_outputs"})
        return self


def arguments_object(text: str) -> Any:
    """Arguments as chat templates expect them: an object where the text is one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
