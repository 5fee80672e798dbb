"""One tokenised example, and what became of all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from adapterhub_local.counts import counted
from adapterhub_local.data.chat import Chat

Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """One tokenised chat: `ids`, and the [start, end) spans of ids that are learned, never the first id.

    Spans are in order and do not touch each other's tokens; that of an answer ends with a token at which the server
    stops, so that the model learns to stop. A chat whose template writes earlier turns otherwise is several examples.
    """

    ids: tuple[int, ...]
    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        ends = [1, *(end for _, end in self.spans)]
        assert all(before <= start <= end for before, (start, end) in zip(ends, self.spans, strict=False)), self.spans
        assert ends[-1] <= len(self.ids), "a span ends in the example"

    @property
    def parts(self) -> tuple["Example", ...]:
        """Itself: a term of a loss may be about several (`Item`)."""
        return (self,)

    @property
    def num_labels(self) -> int:
        return sum(end - start for start, end in self.spans)


class Item(Protocol):
    """What a term of a loss is about: an example, or an answer with those it is compared with, its `parts`."""

    @property
    def parts(self) -> tuple[Example, ...]: ...


def num_tokens(item: Item) -> int:
    """Tokens of all its examples, a prompt that they share counted in each."""
    return sum(len(part.ids) for part in item.parts)


def num_labels(item: Item) -> int:
    """Tokens that are scored."""
    return sum(part.num_labels for part in item.parts)


def parts_of(items: Sequence[Item]) -> list[Example]:
    """The examples of all items, in order."""
    return [part for item in items for part in item.parts]


@dataclass(frozen=True)
class Tokenised:
    """The examples in the order of their chats, and what was done to longer ones and to those that cannot be used."""

    examples: list[Example]
    template: str  # chat or plain
    chats: list[Chat] = field(default_factory=list, repr=False)  # of each example, the one that it is of
    judged: Sequence[Item] | None = None  # pairs, or answers judged good or bad, made of the examples
    max_length: int = 0  # tokens of an example at most
    longest: int = 0
    cut: list[str] = field(default_factory=list)  # where they stand
    skipped: list[str] = field(default_factory=list)  # the same, of those left out
    num_pieces: int = 0  # of plain texts that were cut
    special: list[str] = field(default_factory=list)  # where a text holds what is a control token of the model
    are_tokens: bool = False  # and is learned as one
    divided: list[str] = field(default_factory=list)  # chats that are several examples
    stops: Mapping[str, int] = field(default_factory=dict)  # what was put behind answers the template does not end
    lost: Mapping[str, list[str]] = field(default_factory=dict)  # what the template leaves out -> where
    bad: list[str] = field(default_factory=list)  # sentences about examples that were left out
    day: str | None = None  # the date that the template prints
    described: list[str] = field(default_factory=list)  # chats whose tools the system's turn describes

    @property
    def items(self) -> Sequence[Item]:
        """What an objective's loss is a mean over: the examples, or what judges several together."""
        return self.examples if self.judged is None else self.judged

    @property
    def counts(self) -> dict[str, Any]:
        """What a lineage keeps: the template, and how many examples are not whole."""
        return {"template": self.template, "examples_cut": len(self.cut), "examples_left_out": len(self.skipped)}

    def notes(self) -> list[str]:
        """What a person must know about these examples, a sentence each."""
        notes = list(self.bad)
        if self.cut:
            notes.append(
                f"cut to {self.max_length:,} tokens (data.max_length): {counted(len(self.cut), 'example')}, the "
                f"longest has {self.longest:,}"
            )
        if self.skipped:
            notes.append(
                f"left out: {counted(len(self.skipped), 'example')} with nothing to learn within {self.max_length:,} "
                f"tokens (data.max_length, data.too_long), the first is {self.skipped[0]}"
            )
        if self.num_pieces:
            notes.append(
                f"plain texts are cut into {counted(self.num_pieces, 'piece')} of at most {self.max_length:,} tokens"
            )
        if self.special:
            how = "control tokens" if self.are_tokens else "text, as the server writes them"
            notes.append(
                f"the messages of {counted(len(self.special), 'example')} contain control tokens of the model, such as "
                f"its end of turn, which are learned as {how}; the first is {self.special[0]}"
            )
        if self.divided:
            notes.append(
                f"{counted(len(self.divided), 'chat')} became an example for each answer, because the chat template "
                f"writes an answer differently once more turns follow; the first is {self.divided[0]}"
            )
        for stop, count in self.stops.items():
            notes.append(
                f"the chat template ends {counted(count, 'answer')} without a token at which the server stops: "
                f"'{stop}' is added at the end and learned"
            )
        for what, where in self.lost.items():
            notes.append(
                f"the chat template leaves out {what} in {counted(len(where), 'example')}, the first is {where[0]}"
            )
        if self.described:
            notes.append(
                "the chat template has no form for tools that the server reads: calls and their results in "
                f"{counted(len(self.described), 'chat')} are learned as text, as the server writes them, and "
                f"offered tools are described in the system's turn; the first is {self.described[0]}"
            )
        if self.day:
            notes.append(f"the chat template prints today's date: training always writes {self.day} (data.date)")
        return notes
