"""Prompts to token ids: the base's chat template for conversations, its tokenizer for plain text."""

import threading
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from serve.errors import BadParameter
from serve.protocol import Message


class PromptReader:
    """The base's tokenizer, used by one thread at a time: encoding changes its state."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocabulary_size = vocabulary_size
        self._lock = threading.Lock()

    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of a conversation, up to where the assistant speaks. Raises BadParameter."""
        if not self.tokenizer.chat_template:
            raise BadParameter("this base has no chat template: use /v1/completions", "messages")
        turns = [message.for_template() for message in messages]
        try:
            with self._lock:
                text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
                return self._checked(self.tokenizer.encode(text, add_special_tokens=False), "messages")
        except TemplateError as error:  # templates refuse conversations they were not made for
            raise BadParameter(f"the base's chat template refuses these messages: {error}", "messages") from None

    def plain(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Tokens of a text, or token ids as they are. Raises BadParameter."""
        if not isinstance(prompt, str):
            return self._checked(prompt, "prompt")
        with self._lock:
            return self._checked(self.tokenizer.encode(prompt), "prompt")

    def _checked(self, tokens: Any, param: str) -> tuple[int, ...]:
        if not tokens:
            raise BadParameter("the prompt has no tokens: say something", param)
        if max(tokens) >= self.vocabulary_size:
            raise BadParameter(f"token {max(tokens)} is not one of the base's {self.vocabulary_size}", param)
        return tuple(tokens)


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: those of the generation config, and the tokenizer's."""
    found = model.generation_config.eos_token_id if model.generation_config else None
    ids = found if isinstance(found, list) else [found]
    return frozenset(int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None)
