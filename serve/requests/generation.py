"""The bodies of requests as OpenAI defines them, with the sampling parameters that vLLM adds.

What would change the answer and is not supported is refused by name, never ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from pydantic_core import PydanticCustomError

from serve.engine.request import SamplingParams
from serve.requests.body_part import BodyPart, Whole, is_empty
from serve.requests.messages import Messages, ResponseFormat, StructuredOutputs, Tool, ToolChoice, Tools
from serve.requests.model_ref import ModelRef, read_model
from serve.requests.unsupported import refuse_unsupported

MAX_ALTERNATIVES = 20
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
# how answers are sampled of which nobody says how
PLAIN_SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
StopToken = Annotated[Whole, Field(ge=0, lt=2**31)]
ALL = -1  # max_tokens: all there is room for, as in llama.cpp, LM Studio and Ollama
# what is thought at most where a request says how hard to think, in tokens
EFFORTS: dict[str, int | None] = {"minimal": 128, "low": 512, "medium": 2048, "high": None, "xhigh": None, "max": None}


def _without_empty(value: Any) -> Any:
    """Stop strings without the empty ones, which would stop nothing."""
    if isinstance(value, list):
        return [each for each in value if each != ""]
    return None if value == "" else value


class StreamOptions(BodyPart):
    """`include_usage`: a last chunk with the token counts; `continuous_usage_stats`: the counts so far in each."""

    model_config = ConfigDict(extra="allow")
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers: it changes nothing, and there is none

    @model_validator(mode="after")
    def _refuse_unknown(self) -> "StreamOptions":
        for name, value in (self.model_extra or {}).items():
            if value is not False and not is_empty(value):
                message = f"there is no stream option '{name[:80]}': leave it out"
                raise PydanticCustomError("unknown", message, {"param": "stream_options"})  # type: ignore[arg-type]
        return self


class AdapterTerm(BodyPart):
    """One adapter of a mix, by reference."""

    model_config = ConfigDict(extra="forbid")
    ref: str = Field(pattern="^[^+*]+$")
    weight: float = 1.0


class GenerationRequest(BodyPart):
    """What both endpoints have in common."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: Whole | None = Field(None, description="-1 is all there is room for", ge=ALL)
    min_tokens: Whole | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Whole | None = Field(None, description="0 and -1 are all, as in vLLM", ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    n: Whole | None = Field(None, ge=1, le=128)
    seed: Whole | None = None
    prompt_logprobs: Whole | None = Field(
        None, description="Log-probabilities of the prompt's tokens, as in vLLM", ge=0, le=MAX_ALTERNATIVES
    )
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None, BeforeValidator(_without_empty)
    ] = None
    stop_token_ids: Annotated[list[StopToken], Field(max_length=128, fail_fast=True)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(None, description="What the answer looks like, as in vLLM")
    user: str | None = Field(None, description="Sticks to one side where traffic is split between aliases")
    cache_salt: str | None = Field(
        None, description="Only requests with the same share prefixes, as in vLLM", min_length=1, max_length=256
    )
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    adapters: list[AdapterTerm] | None = Field(
        None, description="A mix on top of the base that `model` names", fail_fast=True
    )

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "GenerationRequest":
        extra = dict(self.model_extra or {})
        if extra.get("best_of") == self.num_choices:  # of as many as are wanted the best are all
            del extra["best_of"]
        refuse_unsupported(extra, type(self).model_fields)
        if self.max_tokens == 0 and not isinstance(self, CompletionRequest):
            raise PydanticCustomError("greater_than_equal", "it must be at least 1", {"param": "max_tokens"})
        if self.prompt_logprobs is not None and self.stream:
            message = "it is not supported with stream: /v1/completions streams them with echo and logprobs"
            raise PydanticCustomError("unsupported", message, {"param": "prompt_logprobs"})
        has_form = self.response_format is not None and self.response_format.is_json
        if has_form and self.structured_outputs is not None:
            message = "response_format says what the answer looks like: leave out one of them"
            raise PydanticCustomError("contrary", message, {"param": "structured_outputs"})
        if (has_form or self.structured_outputs is not None) and self.ignore_eos:
            message = "an answer of a given form has an end: leave out ignore_eos"
            raise PydanticCustomError("contrary", message, {"param": "ignore_eos"})
        return self

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token in value or {}:
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise PydanticCustomError("no_token", "its keys are token ids", {"param": "logit_bias"})
        return value

    def model_ref(self, base: str) -> ModelRef:
        """Which weights are asked for, where `base` is served. Raises ModelNotFound, BadParameter."""
        return read_model(self.model, base, [(term.ref, term.weight) for term in self.adapters or ()])

    @property
    def has_form(self) -> bool:
        """Whether the answer may have to have a form, which has to be compiled."""
        has_schema = self.response_format is not None and self.response_format.is_json
        return has_schema or self.structured_outputs is not None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def repeats_usage(self) -> bool:
        """Whether each chunk of a stream says the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def num_alternatives(self) -> int | None:
        """Alternatives wanted beside each token's log-probability; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def prompt_alternatives(self) -> int | None:
        """The same for the tokens of the prompt."""
        return self.prompt_logprobs

    def sampling_params(
        self, choice: int, max_tokens: int, end_tokens: frozenset[int], defaults: Mapping[str, Any]
    ) -> SamplingParams:
        """The engine's parameters for one of `n` choices; a seed counts up, so that choices differ.

        `defaults` are for what the request leaves out.
        """
        chosen = {name: getattr(self, name) for name in PLAIN_SAMPLING if getattr(self, name) is not None}
        given = {**PLAIN_SAMPLING, **defaults, **chosen}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=given["temperature"],
            top_p=given["top_p"],
            top_k=given["top_k"] if given["top_k"] > 0 else None,
            min_p=given["min_p"],
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=given["repetition_penalty"],
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            min_tokens=self.min_tokens or 0,
            seed=None if self.seed is None else self.seed + choice,
            stop=stop,
            stop_token_ids=frozenset(self.stop_token_ids or ()) | (frozenset() if self.ignore_eos else end_tokens),
            logprobs=self.num_alternatives,
            prompt_logprobs=self.prompt_alternatives,
        )


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Whole | None = Field(None, description="-1 is all there is room for", ge=ALL)
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=MAX_ALTERNATIVES)
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template, as in vLLM")
    continue_final_message: bool = Field(False, description="Go on with the last message instead of answering it")
    add_generation_prompt: bool | None = None
    reasoning_effort: str | None = Field(
        None,
        description="How hard to think: none, minimal (128 tokens), low (512), medium (2,048), or as long as it takes: "
        "high, xhigh, max",
    )
    thinking_token_budget: Whole | None = Field(
        None, description="Tokens of thoughts at most, 0 for none, -1 for no bound", ge=-1
    )
    max_thinking_tokens: Whole | None = Field(None, description="The same by another name", ge=-1)
    include_reasoning: bool = Field(True, description="Whether thoughts are given back")
    # whether max_tokens is lowered to what there is room for: where clients have to give it, they give a large one
    _is_clamped: bool = PrivateAttr(False)
    store: bool | None = Field(
        None, description="Log the answer for later training, where the server keeps a request log (--request-log)"
    )
    metadata: Any = Field(None, description="Noted beside an answer that is logged: at most 16 texts by name")
    parse_special: bool = Field(
        False, description="Control tokens that messages spell are control tokens, not text; as llama.cpp calls it"
    )

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if self.max_completion_tokens == 0:
            param = "max_completion_tokens"
            raise PydanticCustomError("greater_than_equal", "it must be at least 1", {"param": param})
        if self.reasoning_effort not in (None, "none", *EFFORTS):
            message = f"it is one of none, {', '.join(EFFORTS)}"
            raise PydanticCustomError("unknown_effort", message, {"param": "reasoning_effort"})  # type: ignore[arg-type]
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("misplaced", "it needs logprobs = true", {"param": "top_logprobs"})
        if self.continue_final_message and self.add_generation_prompt:
            message = "the last message is continued or answered: leave one of them out"
            raise PydanticCustomError("contrary", message, {"param": "add_generation_prompt"})
        if self.must_call:
            if not self.tools:
                raise PydanticCustomError("misplaced", "it needs tools", {"param": "tool_choice"})
            if not self.callable_tools:
                raise PydanticCustomError("unknown", "no tool has this name", {"param": "tool_choice"})
            if self.ignore_eos:
                raise PydanticCustomError(
                    "contrary", "a call has an end: leave out ignore_eos", {"param": "ignore_eos"}
                )
        if self.structured_outputs is not None and self.callable_tools:
            message = "a call has a form of its own: leave out the tools, or set tool_choice to none"
            raise PydanticCustomError("contrary", message, {"param": "structured_outputs"})
        return self

    @property
    def num_alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def has_form(self) -> bool:
        return super().has_form or self.must_call

    def clamped(self) -> "ChatRequest":
        """The same; an answer longer than there is room for is as long as there is room."""
        self._is_clamped = True
        return self

    @property
    def is_clamped(self) -> bool:
        return self._is_clamped

    @property
    def continues(self) -> bool:
        """Whether the answer continues the last message."""
        last = self.messages[-1]
        return self.continue_final_message or (last.prefix and last.role == "assistant")

    @property
    def begins_answer(self) -> bool:
        """Whether the prompt ends where the assistant begins to speak."""
        if self.continues:
            return False
        return True if self.add_generation_prompt is None else self.add_generation_prompt

    @property
    def max_thoughts(self) -> int | None:
        """Tokens of thoughts at most; None: no bound."""
        if self.reasoning_effort == "none":
            return 0
        bounds = [self.thinking_token_budget, self.max_thinking_tokens, EFFORTS.get(self.reasoning_effort or "")]
        return min((bound for bound in bounds if bound is not None and bound >= 0), default=None)

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call of a tool."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        if self.tool_choice == "none":
            return []
        wanted = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        return [tool for tool in self.tools or () if wanted in (None, tool.function.name)]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. `prompt` is one text, several, one list of token ids, or several."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=128, fail_fast=True)]
        | Annotated[list[Token], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[list[Token], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, max_length=128, fail_fast=True),
        ]
    )
    max_tokens: Whole | None = Field(
        None, description="0 is for echo and prompt_logprobs alone, -1 all there is room for", ge=ALL
    )
    logprobs: Whole | None = Field(None, ge=0, le=MAX_ALTERNATIVES)
    echo: bool | None = None
    add_special_tokens: bool = Field(True, description="Whether the tokenizer adds its own tokens to texts, as in vLLM")

    @model_validator(mode="after")
    def _check_empty(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            message = "it must be at least 1 without echo or prompt_logprobs: there would be no answer"
            raise PydanticCustomError("misplaced", message, {"param": "max_tokens"})
        return self

    @property
    def num_alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompt_alternatives(self) -> int | None:
        if not self.echo or self.logprobs is None:
            return self.prompt_logprobs
        return max(self.logprobs, self.prompt_logprobs or 0)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, each a text or a list of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]


class LoadRequest(BaseModel):
    """POST /v1/load_lora_adapter, as vLLM has it; without a path the name is a reference of the registry."""

    model_config = ConfigDict(strict=True, extra="forbid")
    lora_name: str = Field(min_length=1)
    lora_path: str | None = Field(None, min_length=1)
    load_inplace: bool = False
    pinned: bool = False  # as SGLang has it
    base_model_name: str | None = None


class UnloadRequest(BaseModel):
    """POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(strict=True, extra="forbid")
    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None
    force: bool = False
