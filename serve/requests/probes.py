"""What is asked of a model beside text: embeddings of texts, and how likely given answers are."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serve.requests.body_part import BodyPart, Whole
from serve.requests.generation import Token
from serve.requests.messages import Messages
from serve.requests.model_ref import ModelRef, read_model
from serve.requests.unsupported import refuse_unsupported

Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Token], Field(min_length=1, fail_fast=True)]


class Probe(BodyPart):
    """What both have in common with requests for text."""

    model_config = ConfigDict(extra="allow")

    model: str
    user: str | None = Field(None, description="Sticks to one side where traffic is split between aliases")
    cache_salt: str | None = Field(None, min_length=1, max_length=256)

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "Probe":
        refuse_unsupported(self.model_extra or {}, type(self).model_fields)
        return self

    def model_ref(self, base: str) -> ModelRef:
        """Which weights are asked for, where `base` is served. Raises ModelNotFound, BadParameter."""
        return read_model(self.model, base)

    @property
    def has_form(self) -> bool:
        return False


class EmbeddingsRequest(Probe):
    """POST /v1/embeddings: of each text one vector, made of the model's last hidden states."""

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=2048, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=2048, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Whole | None = Field(None, description="As many as the base has: no other number is possible", ge=1)
    pooling: Literal["last", "mean", "cls"] = Field(
        "last", description="The state of the last token, the mean of all, or that of the first"
    )
    normalize: bool = Field(True, description="Whether vectors have length 1, as OpenAI's")

    @property
    def texts(self) -> list[str | list[int]]:
        """The texts one by one, each a text or a list of token ids."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [[token for token in self.input if isinstance(token, int)]]
        return [part for part in self.input if not isinstance(part, int)]


class ScoreRequest(Probe):
    """POST /v1/score: how likely each of these answers is after a text, or as the answer of a conversation."""

    prompt: str | None = None
    messages: Messages | None = None
    choices: Annotated[list[Text], Field(min_length=1, max_length=1024, fail_fast=True)]
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> "ScoreRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("missing", "prompt or messages is needed, and not both", {"param": "prompt"})
        return self
