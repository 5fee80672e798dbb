"""Generation: the answers to one HTTP request, piece by piece as they come out of the engine."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.tool_calls import Call, CallReader
from serve.engine.loop import EngineLoop
from serve.engine.request import PromptOutput, Sampled, Submission, TokenOutput
from serve.errors import TimedOut
from serve.requests.begun import Begun, Ids
from serve.text.detokenize import Detokenizer
from serve.text.noted import Known, Noted
from serve.text.thoughts import Place, ThoughtReader

TURN = 32  # tokens that are known are gone through, before others have their turn


@dataclass(frozen=True)
class Piece:
    """A part of choice `index`: text, the token it came with, calls that became whole, and at the end why it ended.

    `end` is the token that ended it, which is not part of the text; `thought` is what was thought meanwhile, `stop`
    the stop string that ended it, if one did.
    """

    index: int
    text: str
    sampled: Sampled | None
    finish_reason: str | None
    calls: tuple[Call, ...] = ()
    end: Sampled | None = None
    thought: str = ""
    stop: str | None = None


class Generation:
    """One or more requests that were submitted together; `close` ends what has not ended.

    `readers`: for each request what finds the calls of tools in its text, or none; `thinkers` the same of thoughts. At
    `deadline` (of time.monotonic()) what has not ended fails with TimedOut. What is `known` from another replica comes
    out again from its first token, and then goes on: the requests that ended there are not submitted here.
    """

    def __init__(
        self,
        loop: EngineLoop,
        requests: Sequence[Submission],
        tokenizer: PreTrainedTokenizerBase,
        readers: Sequence[CallReader | None] = (),
        thinkers: Sequence[ThoughtReader | None] = (),
        *,
        deadline: float | None = None,
        known: Known | None = None,
    ) -> None:
        known = known or Known(Begun())
        self.requests = requests
        self.begun = known.begun
        self.ids = Ids(self.begun.seed)
        self.prompts = [PromptOutput()] * len(requests)  # what is known of each prompt since its first token
        self.num_completion_tokens = 0
        self.num_thought_tokens = 0
        self.times: tuple[float, float] | None = None  # of the first and the newest token, time.monotonic()
        self.reasons: list[str] = []  # why answers ended, in the order in which they did
        self.listener: Callable[[Piece], None] | None = None  # gets each piece before anybody else
        self._loop = loop
        self._known = deque(each.output(requests[each.index].id) for each in known.tokens)
        self._is_complete = len(known.ended) == len(requests)
        self._noted: list[Noted] | None = None
        if self.begun.is_noted and all(request.params.prompt_logprobs is None for request in requests):
            self._noted = []
        self._queue = loop.submit(*(request for index, request in enumerate(requests) if index not in known.ended))
        self._next: TokenOutput | None = None
        self._open = {request.id: index for index, request in enumerate(requests)}
        self._readers = dict(zip((request.id for request in requests), readers, strict=False))
        self._thinkers = dict(zip((request.id for request in requests), thinkers, strict=False))
        self._timer = None
        if deadline is not None:
            wait = max(0.0, deadline - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(wait, self._end)
        self._texts = {request.id: Detokenizer(tokenizer, request.params.stop) for request in requests}

    async def begin(self) -> None:
        """Wait for the first token that is made here. Raises what ended the requests before there was one."""
        if self._is_complete:
            return
        self._next = await self._queue.get()
        if self._next.error is not None:
            raise self._next.error

    @property
    def can_move(self) -> bool:
        """Whether its tokens are noted, so that another replica could continue it."""
        return self._noted is not None

    def take_noted(self) -> list[list[Any]]:
        """The tokens that came since they were taken last, as `Noted.to_json` has them."""
        noted, self._noted = self._noted or [], [] if self._noted is not None else None
        return [each.to_json() for each in noted]

    async def _come(self) -> TokenOutput:
        """The next token, those that are known first."""
        if self._known:
            if len(self._known) % TURN == 0:  # others want to be read to, too
                await asyncio.sleep(0)
            return self._known.popleft()
        output, self._next = self._next or await self._queue.get(), None
        return output

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all choices, mixed, in the order in which they come. Raises what ended a request early."""
        while self._open:
            is_known, output = bool(self._known), await self._come()
            if output.request_id not in self._open:
                continue  # a token that was computed before its request was ended here
            if output.error is not None:
                raise output.error
            assert output.sampled is not None
            if output.prompt is not None:
                self.prompts[self._open[output.request_id]] = output.prompt
            index, detokenizer = self._open[output.request_id], self._texts[output.request_id]
            is_empty = self.requests[index].params.max_tokens == 0
            self.num_completion_tokens += not is_empty
            if not is_known:
                now = time.monotonic()
                self.times = (self.times[0] if self.times else now, now)
            sampled: Sampled | None = output.sampled
            end: Sampled | None = None
            finish_reason = output.finish_reason
            if finish_reason == "stop":  # the token that says so is no part of the answer
                text, sampled, end = detokenizer.flush(), None, sampled
            elif is_empty:  # nor is this one
                text, sampled = "", None
            else:
                text = detokenizer.push(output.sampled.token)
                text += self._mark(output.request_id, output.sampled.token)
                text += detokenizer.flush() if finish_reason else ""
            if detokenizer.is_stopped:
                finish_reason = "stop"
            if self._noted is not None and not is_known:
                self._noted.append(Noted.of(index, output, is_last=bool(finish_reason)))
            if finish_reason:
                del self._open[output.request_id]
                if output.finish_reason is None:
                    self._loop.abort(output.request_id)
            thought, text = self._split(output.request_id, text, bool(finish_reason))
            calls: tuple[Call, ...] = ()
            if reader := self._readers.get(output.request_id):
                known = len(reader.calls)
                text = reader.push(text)
                text += reader.flush(is_cut=finish_reason == "length") if finish_reason else ""
                calls = tuple(replace(call, id=self.ids.call(index, call.index)) for call in reader.calls[known:])
                if finish_reason == "stop" and reader.calls:
                    finish_reason = "tool_calls"
            if finish_reason:
                self.reasons.append(finish_reason)
            piece = Piece(index, text, sampled, finish_reason, calls, end, thought, detokenizer.stopped_by or None)
            if self.listener is not None:
                self.listener(piece)
            yield piece

    def _mark(self, request_id: str, token: int) -> str:
        """The spelling of a token that marks a thought, where decoding leaves it out."""
        thinker = self._thinkers.get(request_id)
        return thinker.form.special.get(token, "") if thinker and thinker.place is not Place.PAST else ""

    def _split(self, request_id: str, text: str, is_last: bool) -> tuple[str, str]:
        """The thoughts and the answer in a text."""
        thinker = self._thinkers.get(request_id)
        if thinker is None:
            return "", text
        self.num_thought_tokens += thinker.place is Place.INSIDE
        thought, answer = thinker.push(text)
        if is_last:
            more, rest = thinker.flush()
            thought, answer = thought + more, answer + rest
        return thought, answer

    def close(self) -> None:
        """End the requests that have not ended. May be called more than once."""
        if self._timer is not None:
            self._timer.cancel()
        for request_id in self._open:
            self._loop.abort(request_id)
            self.reasons.append("abort")
        self._open = {}

    def _end(self) -> None:
        self.fail(TimedOut("the answer was not ready in the time that a request may take here", 504))

    def fail(self, error: Exception) -> None:
        """Put an error where the next token is waited for: it ends the answer."""
        for request_id in self._open:
            self._queue.put_nowait(TokenOutput(request_id, None, error=error))
            return

    def usage(self, num_choices: int) -> dict[str, Any]:
        """Token counts; the prompt of `num_choices` neighbours is one prompt."""
        num_prompt = sum(len(request.prompt) for request in self.requests[::num_choices])
        num_cached = sum(prompt.num_cached for prompt in self.prompts[::num_choices])
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": num_prompt + self.num_completion_tokens,
            # what was not found in the cache is put there
            "prompt_tokens_details": {"cached_tokens": num_cached, "cache_write_tokens": num_prompt - num_cached},
            "completion_tokens_details": {"reasoning_tokens": self.num_thought_tokens},
        }
