"""What a text is to a router: the mean of the base's own embeddings of its tokens. No model runs, nothing is loaded.

Word order is lost and the task shows all the same: hashed tokens and pairs of tokens find the tasks of known prompts
no better, and those in other words a little better, but have no place from which a distance could be measured
(benchmarks/router.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.shapes import embeddings_name
from adapterhub_local.base.weights import BaseWeights

HEAD, TAIL = 1200, 800  # characters of a text that are looked at: what is asked stands at its beginning or its end
ROWS = 1 << 14  # of the embeddings at once
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Embeddings:
    """The tokenizer of a base, and its embeddings (vocabulary, hidden) in the dtype they are stored in."""

    encode: Encode
    weight: torch.Tensor

    def mean(self, texts: Sequence[str]) -> torch.Tensor:
        """The mean embedding of each text (texts, hidden) in float32, zero for one without a token."""
        rows = torch.zeros(len(texts), self.weight.shape[1])
        for row, text in zip(rows, texts, strict=True):
            if ids := self.encode(clipped(text)):
                row.copy_(self.weight[torch.as_tensor(ids)].float().mean(0))
        return rows


def clipped(text: str) -> str:
    """What is looked at of a text, so that a long one takes no longer."""
    return text if len(text) <= HEAD + TAIL else text[:HEAD] + text[-TAIL:]


def first_asked(messages: Sequence[Mapping[str, Any]]) -> str:
    """The user's first message of a conversation, by which it is known."""
    texts = (message["content"] for message in messages if message["role"] == "user")
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")


def embeddings_of(info: BaseInfo) -> Embeddings:
    """Of a base that is not loaded: its embeddings alone are read from its files."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(info.folder, trust_remote_code=False)
    weight = BaseWeights(info).read(embeddings_name(info))

    def encode(text: str) -> Sequence[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    return Embeddings(encode, weight)


def projected(weight: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """`weight @ directions` on the CPU in float32, where (vocabulary, hidden) x (hidden, k) makes (vocabulary, k).

    Since a mean is linear, the mean of these rows is what the directions say of the mean embedding: a text costs a
    lookup of k numbers a token. A part at a time: embeddings in 16 bits would else be copied whole.
    """
    table = torch.empty(weight.shape[0], directions.shape[1])
    there = directions.to(weight.device)
    for start in range(0, weight.shape[0], ROWS):
        table[start : start + ROWS] = (weight[start : start + ROWS].float() @ there).cpu()
    return table
