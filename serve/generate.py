"""Generation: the answers to one HTTP request, piece by piece as they come out of the engine."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from serve.detokenize import Detokenizer
from serve.engine.loop import EngineLoop
from serve.engine.request import Request, Sampled


@dataclass(frozen=True)
class Piece:
    """News of choice `index`: text, the token it came with, and at the end why it ended."""

    index: int
    text: str
    sampled: Sampled | None
    finish_reason: str | None


class Generation:
    """One or more requests that were submitted together; `close` ends what has not ended."""

    def __init__(self, loop: EngineLoop, requests: Sequence[Request], tokenizer: PreTrainedTokenizerBase) -> None:
        self.requests = requests
        self.num_completion_tokens = 0
        self._loop = loop
        self._queue = loop.submit(*requests)
        self._open = {request.id: index for index, request in enumerate(requests)}
        self._texts = {request.id: Detokenizer(tokenizer, request.params.stop) for request in requests}

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all choices, mixed, in the order in which they come. Raises what ended a request early."""
        while self._open:
            output = await self._queue.get()
            if output.request_id not in self._open:
                continue  # a token that was computed before its request was ended here
            if output.error is not None:
                raise output.error
            assert output.sampled is not None
            self.num_completion_tokens += 1
            index, detokenizer = self._open[output.request_id], self._texts[output.request_id]
            sampled: Sampled | None = output.sampled
            finish_reason = output.finish_reason
            if finish_reason == "stop":  # the token that says so is no part of the answer
                text, sampled = detokenizer.flush(), None
            else:
                text = detokenizer.push(output.sampled.token)
                text += detokenizer.flush() if finish_reason else ""
            if detokenizer.is_stopped:
                finish_reason = "stop"
            if finish_reason:
                del self._open[output.request_id]
                if output.finish_reason is None:
                    self._loop.abort(output.request_id)
            yield Piece(index, text, sampled, finish_reason)

    def close(self) -> None:
        """End the requests that have not ended. May be called more than once."""
        for request_id in self._open:
            self._loop.abort(request_id)
        self._open = {}

    def usage(self, num_choices: int) -> dict[str, int]:
        """Token counts; the prompt of `num_choices` neighbours is one prompt."""
        num_prompt = sum(len(request.prompt) for request in self.requests[::num_choices])
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": num_prompt + self.num_completion_tokens,
        }
