"""Encoder: text to token ids in many threads at once, each of which lets the others run meanwhile."""

import threading
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

PROBE = "Hello, World!  \u00e9\n\t 123 <b> \u4f60\u597d"


class Encoder:
    """The tokenizer's own way to read text, on a copy whose state nobody changes.

    transformers sets padding and truncation of the one tokenizer at each call, which takes a lock; one that is not
    written in Rust, or reads the probe otherwise than its copy, is used under that lock. `longest` is the number of
    characters of the longest token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._copy = _copy_of(tokenizer)
        self.longest = max(map(len, tokenizer.get_vocab()), default=1)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a text."""
        if self._copy is None:
            with self._lock:
                return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        # a batch, even of one, lets other threads run
        (encoding,) = self._copy.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)


def characters(value: Any) -> int:
    """How many characters the texts in a JSON value have together, names of fields included."""
    total, parts = 0, [value]
    while parts:
        part = parts.pop()
        if isinstance(part, str):
            total += len(part)
        elif isinstance(part, dict):
            parts += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            parts += part
    return total


def _copy_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    if not tokenizer.is_fast:
        return None
    source: Any = tokenizer
    copy = Tokenizer.from_str(source.backend_tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    for special in (False, True):
        if copy.encode(PROBE, add_special_tokens=special).ids != tokenizer.encode(PROBE, add_special_tokens=special):
            return None
    return copy
