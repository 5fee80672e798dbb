"""Tokens: text to token ids and back, as vLLM has it."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serve.requests.generation import Token
from serve.requests.messages import Messages, Tools
from serve.text.prompt import PromptReader


class TokenizeRequest(BaseModel):
    """POST /tokenize: a text as /v1/completions reads it, or messages as /v1/chat/completions does."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False
    parse_special: bool = False  # of messages, as in a ChatRequest

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("missing", "prompt or messages is needed, and not both", {"param": "prompt"})
        return self


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str | None = None
    tokens: Annotated[list[Token], Field(max_length=1 << 17, fail_fast=True)]


def tokenize(reader: PromptReader, body: TokenizeRequest, max_length: int) -> dict[str, Any]:
    """Token ids, how many they are, and how many prompt and answer may have. Raises BadParameter."""
    if body.messages is not None:
        tokens = reader.chat(body.messages, body.tools or [], parse_special=body.parse_special)
    else:
        tokens = reader.plain(body.prompt or "", add_special_tokens=body.add_special_tokens)
    spelled = reader.spelled(tokens) if body.return_token_strs else None
    return {"count": len(tokens), "max_model_len": max_length, "tokens": list(tokens), "token_strs": spelled}
