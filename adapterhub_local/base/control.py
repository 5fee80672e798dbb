"""Control tokens that somebody spells in a text are text: only the chat template writes the real ones.

Training and the server both write conversations this way, so that what a user types, or a training row quotes, can
never end a turn or open another one. What the assistant writes itself (marks of thoughts and calls) stays what it is.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

# what models write between and around their own words, whether a tokenizer calls it special or not
OWN_MARKS = re.compile(
    r"</?\w*(think|thought|reason|tool_call|function_call)\w*>|\[/?(THINK|TOOL_CALLS?)\]", re.IGNORECASE
)
PLAIN_MARK = re.compile(r"</?[\w:]+>")  # an added token of this form that is not special


class ControlTokens:
    """The control tokens of a tokenizer under one chat template, and how texts that spell them are written.

    `shield` puts a private spelling in the place of every control token that a text spells; the template then writes
    the conversation, and `encode` gives the private spellings the tokens of the text they stand for. The private
    spellings are drawn anew in every process, and nothing depends on them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._tokenizer = tokenizer
        self._mark = f"zq{secrets.token_hex(8)}"
        self._twin: Tokenizer | None = None
        self.spellings: dict[str, int] = {}
        if (
            not tokenizer.is_fast
        ):  # it cannot be taken apart; training refuses it, and the server reads as it always did
            self._anywhere = self._in_answers = re.compile("(?!)")
            return
        added = tokenizer.added_tokens_decoder
        named = set(tokenizer.all_special_tokens)
        # as transformers chooses them: tokens that only save space, such as runs of blanks, are not control tokens
        control = {
            token.content: number
            for number, token in added.items()
            if not token.content.isspace() and (token.special or token.content in named or token.content in template)
        }
        special = {token.content for token in added.values() if token.special} | named
        answers = [
            text for text in control
            if not OWN_MARKS.fullmatch(text) and (text in special or not PLAIN_MARK.fullmatch(text))
        ]  # fmt: skip
        self.spellings = control
        self._anywhere, self._in_answers = _any_of(control), _any_of(answers)

    def shield(self, value: Any, *, is_answer: bool = False) -> Any:
        """`value` (text, or lists and tables of texts) with a private spelling for each control token in it."""
        pattern = self._in_answers if is_answer else self._anywhere
        if isinstance(value, str):
            return pattern.sub(lambda match: self._private("t", self.spellings[match[0]]), value)
        if isinstance(value, Mapping):
            return {self.shield(key, is_answer=is_answer): self.shield(part, is_answer=is_answer)
                    for key, part in value.items()}  # fmt: skip
        if isinstance(value, list | tuple):
            return [self.shield(part, is_answer=is_answer) for part in value]
        return value

    def shield_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages for a chat template with what each says shielded; roles stay as they are."""
        return [
            {
                key: value if key == "role" else self.shield(value, is_answer=message.get("role") == "assistant")
                for key, value in message.items()
            }
            for message in messages
        ]

    def spells(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether one of the messages spells a control token in its text."""
        return any(
            (self._in_answers if message["role"] == "assistant" else self._anywhere).search(message["content"])
            for message in messages
        )

    def is_shielded(self, text: str) -> bool:
        """Whether a text holds private spellings."""
        return self._mark in text

    def restore(self, text: str) -> str:
        """The text as people read it: private spellings as what they stand for."""
        if not self.is_shielded(text):
            return text
        texts = {number: spelling for spelling, number in self.spellings.items()}
        return re.sub(rf"{self._mark}t(\d+)z", lambda match: texts[int(match[1])], text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts that a chat template wrote from shielded messages."""
        plain = [text for text in texts if not self.is_shielded(text)]
        known = iter(self._tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else ())
        return [self._as_twin(text) if self.is_shielded(text) else next(known) for text in texts]

    def _private(self, kind: str, number: int) -> str:
        return f"{self._mark}{kind}{number}z"

    def _as_twin(self, text: str) -> list[int]:
        """Encoded by the tokenizer's twin, to which the control tokens are private and their own spellings are text."""
        if self._twin is None:
            self._twin = self._make_twin()
        texts = {number: spelling for spelling, number in self.spellings.items()}

        def swapped(match: re.Match[str]) -> str:
            if match[0].startswith(self._mark):
                return texts[int(match[0][len(self._mark) + 1 : -1])]
            return self._private("c", self.spellings[match[0]])

        pattern = rf"{self._mark}t\d+z|{self._anywhere.pattern}"
        return self._twin.encode(re.sub(pattern, swapped, text), add_special_tokens=False).ids

    def _make_twin(self) -> Tokenizer:
        described = json.loads(self._tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        called = {text: self._private("c", number) for text, number in self.spellings.items()}
        for token in described["added_tokens"]:
            token["content"] = called.get(token["content"], token["content"])
        model = described["model"]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            pairs = (pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model.get("merges") or ())
            merged = {"".join(pair) for pair in pairs} & called.keys()  # text becomes these by merging alone
            model["vocab"] = {called.get(text, text): number for text, number in vocabulary.items()}
            model["vocab"] |= {text: vocabulary[text] for text in merged}
        elif isinstance(vocabulary, list):
            model["vocab"] = [[called.get(text, text), score] for text, score in vocabulary]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = called.get(model["unk_token"], model["unk_token"])
        described |= {"post_processor": None, "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(described))


def _any_of(texts: Sequence[str] | Mapping[str, int]) -> re.Pattern[str]:
    """What matches any of the texts, the longest first; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
