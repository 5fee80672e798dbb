"""Noted: the tokens of an answer as they came out of the engine, as plain values, and back."""

from dataclasses import dataclass, replace
from typing import Any

from serve.engine.request import PromptOutput, Sampled, Submission, TokenOutput
from serve.requests.begun import Begun

BY_TEXT = "text"  # a choice was ended by what its tokens spell, of which the engine knows nothing


@dataclass(frozen=True)
class Noted:
    """One token of choice `index`; `num_cached` tokens of its prompt were known, which stands with its first."""

    index: int
    sampled: Sampled
    finish_reason: str | None = None  # the engine's, or BY_TEXT
    num_cached: int | None = None

    @classmethod
    def of(cls, index: int, output: TokenOutput, *, is_last: bool) -> "Noted":
        """A token that has come, the last of its choice or not."""
        assert output.sampled is not None
        num_cached = output.prompt.num_cached if output.prompt is not None else None
        reason = output.finish_reason or (BY_TEXT if is_last else None)
        return cls(index, output.sampled, reason, num_cached)

    def to_json(self) -> list[Any]:
        """Plain values, as few as will do: nearly every token is a choice and a number."""
        sampled = self.sampled
        scored = [] if sampled.logprob is None else [sampled.logprob, sampled.top_logprobs]
        rest = [self.finish_reason, self.num_cached, *scored]
        return [self.index, sampled.token, *(rest if rest != [None, None] else ())]

    @classmethod
    def from_json(cls, values: list[Any]) -> "Noted":
        """What `to_json` gave."""
        index, token, finish_reason, num_cached, logprob, top = values + [None] * (6 - len(values))
        sampled = Sampled(token, logprob, tuple((each, value) for each, value in top or ()))
        return cls(index, sampled, finish_reason, num_cached)

    def output(self, request_id: str) -> TokenOutput:
        """The token as the engine gave it."""
        prompt = PromptOutput(self.num_cached) if self.num_cached is not None else None
        reason = None if self.finish_reason == BY_TEXT else self.finish_reason
        return TokenOutput(request_id, self.sampled, reason, prompt=prompt)


class Known:
    """What is known of an answer that another replica may have begun; of a new one nothing but its seed."""

    def __init__(self, begun: Begun) -> None:
        self.begun = begun
        self.tokens = [Noted.from_json(each) for each in begun.outputs]
        self.ended = frozenset(each.index for each in self.tokens if each.finish_reason is not None)  # choices

    def begin(self, asked: Submission, index: int) -> Submission:
        """The request of a choice, which goes on behind its tokens; drawn, if it has no seed, by the answer's."""
        output = tuple(each.sampled.token for each in self.tokens if each.index == index)
        return replace(asked, seed=self.begun.seed_of(index), output=output)
