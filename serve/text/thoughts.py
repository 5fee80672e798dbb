"""Thoughts: what a model writes to itself before it answers, separated from the answer, and bounded.

Families mark thoughts in text, such as <think>...</think>; which marks a base has, its chat template shows.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from enum import Enum

from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.tool_calls import overlap
from adapterhub_local.data.chat import MARKS
from serve.engine.form import Constraint
from serve.text.detokenize import Detokenizer

TAIL = 16  # tokens at the end of a prompt that show whether the model already thinks when it begins
MAX_BACK = 16  # tokens that are taken back at once, at most
AFTER = "\n\n"  # between thoughts and answer


class Place(Enum):
    """Where in an answer its reader is: before a thought that may come, in it, just behind it, or past all that."""

    BEFORE = "before"
    INSIDE = "inside"
    BEHIND = "behind"
    PAST = "past"


@dataclass(frozen=True)
class ThoughtFormat:
    """How a family marks thoughts.

    `ids`: marks that are tokens of their own; `special`: tokens of the marks that decoding leaves out, as spelled.
    """

    begin: str
    end: str
    ids: Mapping[str, int]
    special: Mapping[int, str]

    @property
    def can_precede_forms(self) -> bool:
        """Whether a grammar can recognise its marks: they are plain text, or one token each."""
        return not self.special or {self.begin, self.end} <= self.ids.keys()

    def place(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> Place:
        """Where an answer to this prompt begins: some templates open the thought, or close it, themselves."""
        tail = str(tokenizer.decode(list(prompt[-TAIL:]), skip_special_tokens=False)).rstrip()
        if tail.endswith(self.begin.rstrip()):
            return Place.INSIDE
        return Place.PAST if tail.endswith(self.end) else Place.BEFORE


def thoughts_of(template: str, tokenizer: PreTrainedTokenizerBase) -> ThoughtFormat | None:
    """How thoughts are marked under a chat template; None if it knows none."""
    for begin, end in MARKS:
        if end in template:
            spelled = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
            special = {int(key): text for key, text in spelled if text in begin or text in end}
            own = {text: key for text, key in tokenizer.get_added_vocab().items() if text in (begin, end)}
            return ThoughtFormat(begin, end, own, special)
    return None


class ThoughtReader:
    """The text of one answer while it comes, split into thoughts and answer. Blanks around thoughts go."""

    def __init__(self, form: ThoughtFormat, place: Place) -> None:
        self.form = form
        self.place = place
        self._begin, self._end = form.begin.rstrip(), form.end
        self._held = ""
        self._has_thought = False

    def push(self, text: str) -> tuple[str, str]:
        """The thoughts and the answer that are certain now that `text` has come."""
        if self.place is Place.PAST:
            return "", text
        self._held += text
        thought = answer = ""
        if self.place is Place.BEFORE:
            begun = self._held.lstrip()
            if begun.startswith(self._begin):
                self.place, self._held = Place.INSIDE, begun[len(self._begin) :]
            elif not self._begin.startswith(begun):
                self.place = Place.PAST
        if self.place is Place.INSIDE:
            thought = self._inside()
        if self.place is Place.BEHIND:
            self._held = self._held.lstrip()
            self.place = Place.PAST if self._held else Place.BEHIND
        if self.place is Place.PAST:
            answer, self._held = self._held, ""
        return thought, answer

    def flush(self) -> tuple[str, str]:
        """The rest, after the last text. An end mark that was cut is dropped."""
        held, self._held = self._held, ""
        if self.place is Place.INSIDE:
            size = overlap(held, self._end)
            return held[: len(held) - size if 2 * size > len(self._end) else len(held)].rstrip(), ""
        return "", held if self.place is Place.BEFORE else ""

    def _inside(self) -> str:
        before, found, rest = self._held.partition(self._end)
        if found:
            self.place, self._held = Place.BEHIND, rest
            certain = before.rstrip()
        else:  # what may be the mark's beginning waits, and blanks that may be the last
            certain = before[: len(before) - overlap(before, self._end)].rstrip()
            self._held = before[len(certain) :]
        if not self._has_thought:
            blanks = len(certain) - len(certain.lstrip())
            certain = certain[blanks:]
            self._has_thought = bool(certain)
            self._held = self._held if certain or found else self._held.lstrip()
        return certain


class ThoughtBound:
    """A constraint that closes a thought of `limit` tokens by the marks of the family, whatever the model would say.

    `inner` is the form of the answer, if it has one, which then allows for thoughts; `size` that of the vocabulary.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        form: ThoughtFormat,
        place: Place,
        limit: int,
        size: int,
        inner: Constraint | None = None,
    ) -> None:
        self._reader = ThoughtReader(form, place)
        self._text = Detokenizer(tokenizer)
        self._closing: list[int] = tokenizer.encode(f"\n{form.end}{AFTER}", add_special_tokens=False)
        self._forced: list[int] = []
        self._limit, self._size, self._inner = limit, size, inner
        self._count = 0
        self._everything = b"\x01" * size
        # before each of the last tokens: reader, text, what was forced, count
        self._before: deque[tuple[ThoughtReader, Detokenizer, list[int], int]] = deque(maxlen=MAX_BACK)
        self._look()

    def allowed(self) -> bytes:
        """One byte a token of the vocabulary, 0 where the token may not come next."""
        inner = self._everything if self._inner is None else self._inner.allowed()
        if not self._forced or not inner[self._forced[0]]:  # a thought is not closed within half a character
            return inner
        mask = bytearray(self._size)
        mask[self._forced[0]] = 1
        return bytes(mask)

    def advance(self, token: int) -> None:
        """Note that `token` came."""
        if self._inner is not None:
            self._inner.advance(token)
        self._before.append((self._reader, self._text, self._forced, self._count))
        if self._forced and token == self._forced[0]:
            self._forced = self._forced[1:]
        if self._reader.place is Place.PAST:
            return
        self._reader, self._text = copy(self._reader), self._text.copy()
        self._count += self._reader.place is Place.INSIDE
        self._reader.push(self._text.push(token) + self._reader.form.special.get(token, ""))
        if not self._forced:
            self._look()

    def rollback(self, count: int) -> None:
        """Take the last `count` tokens back, at most MAX_BACK."""
        if self._inner is not None:
            self._inner.rollback(count)
        for _ in range(count):
            self._reader, self._text, self._forced, self._count = self._before.pop()

    def forced(self) -> list[int]:
        """Tokens that must come next: those that close a thought, or what the inner form forces."""
        if self._forced:
            return list(self._forced)
        return [] if self._inner is None else self._inner.forced()

    def _look(self) -> None:
        if self._reader.place is Place.INSIDE and self._count >= self._limit:
            self._forced = list(self._closing)
