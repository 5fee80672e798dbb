"""Text while it streams: whole characters, and no part of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.text.detokenize import Detokenizer
from tests.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()  # one token a byte: every border falls inside some character


def stream(tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(TOKENIZER, stop)
    pieces = [detokenizer.push(token) for token in tokens]
    return [*pieces, detokenizer.flush()], detokenizer


@given(st.text(max_size=40))
def test_pieces_join_to_the_text(text: str) -> None:
    """The pieces of any text join to it, and none of them ends inside a character."""
    pieces, _ = stream(TOKENIZER.encode(text))
    assert "".join(pieces) == text
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=120))
def test_any_bytes(tokens: list[int]) -> None:
    """Bytes that are no text, too, come out as the tokenizer spells them all at once, for long runs nearly so."""
    pieces, _ = stream(tokens)
    whole = TOKENIZER.decode(tokens)
    if len(tokens) <= 32:
        assert "".join(pieces) == whole
    assert "".join(pieces).replace("\ufffd", "") == whole.replace("\ufffd", "") or len(tokens) > 32


def test_characters_come_as_soon_as_they_are_whole() -> None:
    """A character of three bytes comes with its third."""
    pieces, _ = stream(TOKENIZER.encode("a€b"))
    assert pieces == ["a", "", "", "€", "b", ""]


def test_half_a_character_at_the_end() -> None:
    """What never became whole comes as a replacement at the end."""
    pieces, _ = stream(TOKENIZER.encode("a€")[:-1])
    assert pieces == ["a", "", "", "\ufffd"]


def test_special_tokens_are_no_text() -> None:
    """Special tokens are left out."""
    tokens = TOKENIZER.encode("a<|im_end|>b")
    assert len(tokens) == 3
    assert "".join(stream(tokens)[0]) == "ab"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings(text: str, stop: list[str]) -> None:
    """Exactly the text before the first stop string is given out, and nothing has to be taken back."""
    pieces, detokenizer = stream(TOKENIZER.encode(text), tuple(stop))
    found = [end for end in range(len(text) + 1) if any(text[:end].endswith(each) for each in stop)]
    if not found:
        assert ("".join(pieces), detokenizer.is_stopped) == (text, False)
        return
    # the first to be complete; of those complete at once, the one that began first
    begin = min(found[0] - len(each) for each in stop if text[: found[0]].endswith(each))
    assert ("".join(pieces), detokenizer.is_stopped) == (text[:begin], True)


@pytest.mark.parametrize(
    ("text", "pieces"), [("abX", ["", "", "abX", ""]), ("ab", ["", "", "ab"]), ("abc", ["", "", "", ""])]
)
def test_beginnings_of_stop_strings_are_held_back(text: str, pieces: list[str]) -> None:
    """The beginning of a stop string waits until it is known to be none."""
    assert stream(TOKENIZER.encode(text), ("abc",))[0] == pieces
