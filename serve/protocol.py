"""The bodies of requests as OpenAI defines them.

What would change the answer and is not supported is refused by name, never ignored.
"""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serve.engine.request import SamplingParams

MAX_ALTERNATIVES = 20
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
# Parameters that are not supported, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# Parameters that cannot change the answer.
IGNORED = frozenset(
    [
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    ]
)
Stop = Annotated[str, Field(min_length=1)]
Token = Annotated[int, Field(ge=0)]


class StreamOptions(BaseModel):
    """`include_usage`: a last chunk with the token counts."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class AdapterTerm(BaseModel):
    """One adapter of a mix, by reference."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    ref: str = Field(pattern="^[^+*]+$")
    weight: float = 1.0


class GenerationRequest(BaseModel):
    """What both endpoints have in common."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: list[Token] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    adapters: list[AdapterTerm] | None = Field(None, description="A mix on top of the base that `model` names")

    @model_validator(mode="after")
    def _name_mix(self) -> "GenerationRequest":
        """`adapters` says the same as a mix behind the base's name, and is known by that from here on."""
        if self.adapters:
            terms = "+".join(f"{term.ref}*{term.weight!r}".replace("e+", "e") for term in self.adapters)
            self.model, self.adapters = f"{self.model}:{terms}", None
        return self

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "GenerationRequest":
        for name, value in (self.model_extra or {}).items():
            if value is None or name in IGNORED or value in NEUTRAL.get(name, ()):
                continue
            if name in NEUTRAL:
                raise PydanticCustomError(
                    "unsupported", "this parameter is not supported: leave it out", {"param": name}
                )
            near = difflib.get_close_matches(name, [*type(self).model_fields, *NEUTRAL], n=1)
            hint = f": did you mean {near[0]}?" if near else ": leave it out"
            raise PydanticCustomError("unknown", f"there is no such parameter{hint}", {"param": name})
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("misplaced", "it is for stream = true only", {"param": "stream_options"})
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_alternatives(self) -> int | None:
        """Alternatives wanted beside each token's log-probability; None: no log-probabilities."""
        raise NotImplementedError

    def sampling_params(self, choice: int, max_tokens: int, end_tokens: frozenset[int]) -> SamplingParams:
        """The engine's parameters for one of `n` choices; a seed counts up, so that choices differ."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            seed=None if self.seed is None else self.seed + choice,
            stop=stop,
            stop_token_ids=frozenset(self.stop_token_ids or ()) | (frozenset() if self.ignore_eos else end_tokens),
            logprobs=self.num_alternatives,
        )


class TextPart(BaseModel):
    """A part of a message; only text is read."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates expect it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("misplaced", "it needs logprobs = true", {"param": "top_logprobs"})
        return self

    @property
    def num_alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. `prompt` is one text, several, one list of token ids, or several."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)

    @property
    def num_alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, each a text or a list of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]
