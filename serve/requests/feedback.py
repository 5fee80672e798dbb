"""Feedback: what POST /v1/feedback says of an answer that was logged."""

from typing import Any

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serve.requests.body_part import BodyPart, Whole
from serve.requests.messages import Message

NOTHING = "write at least one of rating, correction and comment"


class FeedbackRequest(BodyPart):
    """POST /v1/feedback. The last feedback on a choice counts, as a whole."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(description="The id of the answer, such as chatcmpl-...", min_length=1, max_length=128)
    choice: Whole | None = Field(None, description="Which of several choices (n), from 0", ge=0)
    rating: float | None = Field(None, description="From 0 (bad) to 1 (good)", ge=0, le=1)
    correction: str | Message | None = Field(
        None, description="What it should have answered: a text, or a message of the assistant with calls"
    )
    comment: str | None = Field(None, max_length=10_000)
    metadata: dict[str, Any] | None = Field(None, description="At most 16 texts by name")

    @model_validator(mode="after")
    def _check(self) -> "FeedbackRequest":
        if self.rating is None and self.correction is None and not self.comment:
            raise PydanticCustomError("missing", NOTHING, {"param": "rating"})
        if self.correction is None:
            return self
        message = self.corrected
        assert message is not None
        if message["role"] != "assistant" or not (message["content"].strip() or message.get("tool_calls")):
            what = "it is a text, or a message of the assistant, and not empty"
            raise PydanticCustomError("unknown", what, {"param": "correction"})
        return self

    @property
    def corrected(self) -> dict[str, Any] | None:
        """The correction as a message, in the form in which chat templates get it."""
        if isinstance(self.correction, str):
            return {"role": "assistant", "content": self.correction}
        return self.correction.for_template() if self.correction is not None else None
