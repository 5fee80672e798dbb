"""Logprobs: log-probabilities in the forms of OpenAI's two endpoints, and in vLLM's of a prompt. Plain dictionaries."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from serve.engine.request import Sampled, Scores

Spell = Callable[[int], str]  # a token by itself as text
MAX_NUMBERS = 1 << 19  # log-probabilities of prompts in one answer, which is then about 30 MB


@dataclass(frozen=True)
class Echo:
    """The text that an answer begins with, and where in it each token of the prompt begins, if that is asked for."""

    text: str = ""
    offsets: Sequence[int] = ()


def of_chat(sampled: Sequence[Sampled], spell: Spell) -> dict[str, Any]:
    """`logprobs` of a choice of a chat."""
    content = [
        {
            **_entry(one.token, one.logprob, spell),
            "top_logprobs": [_entry(*alternative, spell) for alternative in one.top_logprobs],
        }
        for one in sampled
    ]
    return {"content": content, "refusal": None}


def of_completion(sampled: Sequence[Sampled], offsets: Sequence[int], spell: Spell) -> dict[str, Any]:
    """`logprobs` of a choice of a completion; `offsets` are where its tokens begin in the choice's text."""
    return {
        "tokens": [spell(one.token) for one in sampled],
        "token_logprobs": [one.logprob for one in sampled],
        "top_logprobs": [_best([*one.top_logprobs, (one.token, one.logprob)], spell) for one in sampled],
        "text_offset": list(offsets),
    }


def of_echo(
    prompt: Sequence[int], scores: Sequence[Scores], echo: Echo, num_alternatives: int, spell: Spell
) -> dict[str, Any]:
    """The same of the prompt's tokens. There is nothing to say of the first, which comes after none."""
    top: list[dict[str, float] | None] = [None]
    logprobs: list[float | None] = [None]
    for token, (logprob, _, best) in zip(prompt[1:], _each(scores, num_alternatives), strict=True):
        top.append(_best([*best, (token, logprob)], spell))
        logprobs.append(logprob)
    tokens = [spell(token) for token in prompt]
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": list(echo.offsets)}


def of_prompt(prompt: Sequence[int], scores: Sequence[Scores], num_alternatives: int, spell: Spell) -> list[Any]:
    """vLLM's `prompt_logprobs`: null, then for each token itself and the likeliest alternatives, by token id."""
    found: list[Any] = [None]
    for token, (logprob, rank, best) in zip(prompt[1:], _each(scores, num_alternatives), strict=True):
        ranked = {token: (logprob, rank)}
        for number, (other, value) in enumerate(best, 1):
            ranked.setdefault(other, (value, number))
        found.append({
            str(each): {"logprob": value, "rank": place, "decoded_token": spell(each)}
            for each, (value, place) in ranked.items()
        })  # fmt: skip
    return found


def joined(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The lists of one, and then those of the other."""
    if first is None or second is None:
        return dict(first or second or {}) or None
    return {name: first[name] + second[name] for name in first}


def _each(scores: Sequence[Scores], num_alternatives: int) -> Iterator[tuple[float, int, list[tuple[int, float]]]]:
    """Log-probability, rank and the likeliest alternatives of one token after the other."""
    for part in scores:
        for index, (logprob, rank) in enumerate(zip(part.logprobs, part.ranks, strict=True)):
            start = index * part.num_best
            best = zip(
                part.tokens[start : start + part.num_best], part.values[start : start + part.num_best], strict=True
            )
            yield logprob, rank, list(islice(best, num_alternatives))


def _best(alternatives: Sequence[tuple[int, float | None]], spell: Spell) -> dict[str, Any]:
    """By text; of tokens with the same text, as parts of characters have, the likeliest, which comes first."""
    found: dict[str, Any] = {}
    for token, logprob in alternatives:
        found.setdefault(spell(token), logprob)
    return found


def _entry(token: int, logprob: float | None, spell: Spell) -> dict[str, Any]:
    text = spell(token)
    # a token may be a part of a character, whose bytes its spelling does not show
    data = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": data}
