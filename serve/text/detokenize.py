"""Tokens to text while they arrive: never half a character, never a part of a stop string."""

from collections.abc import Sequence
from copy import copy

from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.tool_calls import overlap

REPLACEMENT = "\ufffd"
MAX_OPEN_TOKENS = 32  # a character has at most 4 bytes; tokens that never become text must not pile up


class Detokenizer:
    """The text of one answer. `is_stopped` once a stop string was met; it and what follows are left out."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.stop = tuple(stop)
        self.stopped_by = ""  # the stop string that was met
        self._tokens: list[int] = []
        self._start = 0  # tokens before this one no longer influence how the next ones are spelled
        self._end = 0  # tokens [start, end) were given out as text
        self._given = 0  # characters given out of the text of tokens [end, ...)
        self._held = ""  # text that may be the beginning of a stop string

    @property
    def is_stopped(self) -> bool:
        return bool(self.stopped_by)

    def copy(self) -> "Detokenizer":
        """Another that continues from here."""
        other = copy(self)
        other._tokens = list(self._tokens)
        return other

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come."""
        if self.is_stopped:
            return ""
        self._tokens.append(token)
        return self._cut(self._decode())

    def flush(self) -> str:
        """The rest, after the last token."""
        if self.is_stopped:
            return ""
        rest = self._text(self._start, len(self._tokens))[len(self._text(self._start, self._end)) + self._given :]
        held, self._held = self._cut(rest) + self._held, ""
        return held

    def _decode(self) -> str:
        """Text that became certain with the newest token."""
        before = len(self._text(self._start, self._end))
        text = self._text(self._start, len(self._tokens))[before:]
        # an unfinished character is spelled as one replacement; what stands before it is final
        is_open = text.endswith(REPLACEMENT) and len(self._tokens) - self._end <= MAX_OPEN_TOKENS
        certain = text[:-1] if is_open else text
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        if not is_open and text:
            self._start, self._end, self._given = self._end, len(self._tokens), 0
        return new

    def _text(self, start: int, end: int) -> str:
        text = self.tokenizer.decode(self._tokens[start:end], skip_special_tokens=self.skip_special_tokens)
        assert isinstance(text, str)
        return text

    def _cut(self, new: str) -> str:
        """Of what was held back and `new`, the part that can be given out."""
        text = self._held + new
        found = [(at, stop) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found, key=lambda each: each[0])
            self._held = ""
            return text[:at]
        held = max((overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
