"""Ollama's way to ask, POST /api/chat and /api/generate, read as the requests that they amount to."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serve.requests.body_part import BodyPart, Carried, Whole, is_empty
from serve.requests.generation import ChatRequest, CompletionRequest, GenerationRequest
from serve.requests.messages import MAX_CALLS, MAX_MESSAGES, FunctionName, Tools
from serve.requests.translated import translated

TAKEN = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")
# what /v1/chat/completions calls otherwise
NAMES = {
    "max_completion_tokens": "options.num_predict",
    "max_tokens": "options.num_predict",
    "response_format": "format",
    "reasoning_effort": "think",
    "thinking_token_budget": "think",
    **{name: f"options.{name}" for name in TAKEN},
}
# options with the values that ask for nothing; what only says how the machine is used asks for nothing at all
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "draft_num_predict": (0,),
    "mirostat": (0,),
    "num_keep": (0,),
    "penalize_newline": (False, True),
    "repeat_penalty": (1,),
    "tfs_z": (1,),
    "typical_p": (1,),
}
MACHINE = frozenset(
    [
        "f16_kv",
        "logits_all",
        "low_vram",
        "main_gpu",
        "mirostat_eta",
        "mirostat_tau",
        "num_batch",
        "num_ctx",
        "num_gpu",
        "num_thread",
        "numa",
        "repeat_last_n",
        "use_mlock",
        "use_mmap",
        "vocab_only",
    ]
)
WHOLE_CONTEXT = -2  # num_predict: as long as the context, as -1


class OllamaCall(Carried):
    """A call that an earlier answer made."""

    class Function(Carried):
        """Its function."""

        name: FunctionName
        arguments: dict[str, Any] = Field(default_factory=dict)

    id: str = ""
    function: Function


class OllamaMessage(Carried):
    """A message of the conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[OllamaCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_name: str | None = None

    def for_chat(self) -> dict[str, Any]:
        """The message as /v1/chat/completions has it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content, "name": self.tool_name}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "function": {"name": call.function.name, "arguments": call.function.arguments}}
                for call in self.tool_calls
            ]
        return message


class OllamaRequest(BodyPart):
    """What both have in common."""

    model_config = ConfigDict(extra="allow")

    model: str
    format: Literal["json", ""] | dict[str, Any] | None = None
    options: dict[str, Any] = Field(default_factory=dict, max_length=64)
    stream: bool = True
    keep_alive: Any = None
    think: bool | str | None = None
    logprobs: bool = False
    top_logprobs: Whole = 0

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "OllamaRequest":
        for name, value in (self.model_extra or {}).items():
            if not is_empty(value) and value is not False:
                message = f"'{name[:80]}' is not supported: leave it out"
                raise PydanticCustomError("unsupported", message, {"param": name[:80]})  # type: ignore[arg-type]
        if self.logprobs:
            message = "log-probabilities are given by /v1/chat/completions only"
            raise PydanticCustomError("unsupported", message, {"param": "logprobs"})  # type: ignore[arg-type]
        for name, value in self.options.items():
            known = name in TAKEN or name in MACHINE or name == "num_predict"
            if not known and not is_empty(value) and value not in NEUTRAL.get(name, ()):
                hint = ": /v1/chat/completions has repetition_penalty" if name == "repeat_penalty" else ""
                message = f"{name[:80]} is not supported at this value{hint}"
                raise PydanticCustomError("unsupported", message, {"param": "options"})  # type: ignore[arg-type]
        return self

    def sampling(self) -> dict[str, Any]:
        """What the options ask for, and what the answer looks like."""
        body: dict[str, Any] = {name: self.options.get(name) for name in TAKEN}
        body |= {"model": plain_name(self.model), "stream": self.stream}
        wanted = self.options.get("num_predict")
        body["max_tokens"] = -1 if wanted in (None, WHOLE_CONTEXT) else wanted
        if isinstance(self.format, dict):
            body["response_format"] = {"type": "json_schema", "json_schema": {"schema": self.format}}
        elif self.format:
            body["response_format"] = {"type": "json_object"}
        return body

    def thinking(self) -> dict[str, Any]:
        """How hard to think."""
        if isinstance(self.think, str):
            return {"reasoning_effort": self.think}
        return {"reasoning_effort": "none"} if self.think is False else {}


class OllamaChatRequest(OllamaRequest):
    """POST /api/chat."""

    messages: Annotated[list[OllamaMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    tools: Tools | None = None

    def chat(self) -> ChatRequest:
        """The chat request that this is. Raises ValidationError in this request's own names."""
        turns = [message.for_chat() for message in self.messages]
        body = {**self.sampling(), **self.thinking(), "messages": turns, "tools": self._tools()}
        return translated(ChatRequest, body, NAMES).clamped()

    def _tools(self) -> list[dict[str, Any]] | None:
        return [tool.model_dump(exclude_none=True) for tool in self.tools] if self.tools else None


class GenerateRequest(OllamaRequest):
    """POST /api/generate: a text that is answered, or with `raw` continued. Without one the model is only named."""

    prompt: str = ""
    system: str | None = None
    raw: bool = False

    def asked(self) -> GenerationRequest:
        """The request that this is. Raises ValidationError in this request's own names."""
        if self.raw:
            return translated(CompletionRequest, self.sampling() | {"prompt": self.prompt}, NAMES)
        turns = [{"role": "system", "content": self.system}] if self.system else []
        turns.append({"role": "user", "content": self.prompt})
        return translated(ChatRequest, {**self.sampling(), **self.thinking(), "messages": turns}, NAMES).clamped()


class ShowRequest(Carried):
    """POST /api/show; older clients say `name`."""

    model: str

    @model_validator(mode="before")
    @classmethod
    def _read_name(cls, value: Any) -> Any:
        is_old = isinstance(value, dict) and "model" not in value and "name" in value
        return {**value, "model": value["name"]} if is_old else value


def plain_name(model: str) -> str:
    """A model's name without the tag that Ollama's clients add to names that have none."""
    return model.removesuffix(":latest")
