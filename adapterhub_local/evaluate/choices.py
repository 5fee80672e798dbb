"""Accuracy over given choices: the answer of a model is the choice it finds most likely, end of turn included."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.chat_settings import ChatSettings
from adapterhub_local.base.model import CausalModel
from adapterhub_local.data.chat import Chat
from adapterhub_local.errors import BadData, InputError
from adapterhub_local.rows.examples import Example, tokenise_all
from adapterhub_local.rows.packing import forward, is_exact, pack


def with_choices(
    chats: Sequence[Chat],
    choices: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    settings: ChatSettings | None = None,
    stops: frozenset[int] | None = None,
) -> tuple[list[list[Example]], list[int]]:
    """Each chat with each choice as its last answer, and which choice is right.

    Raises BadData where a reference answer is none of the choices, InputError for fewer than two different ones.
    """
    if len(set(choices)) < 2 or len(set(choices)) < len(choices):
        raise InputError(f"--choices needs two or more different answers, not {', '.join(choices) or 'none'}")
    right = []
    for chat in chats:
        answer = chat.messages[-1]["content"] if chat.messages else ""
        if answer not in choices:
            raise BadData(f"{chat.where}: the answer {answer[:40]!r} is none of the choices {', '.join(choices)}")
        right.append(list(choices).index(answer))
    answered = [replace(chat, messages=(*chat.prompt, _answer(choice))) for chat in chats for choice in choices]
    examples = tokenise_all(
        answered, tokenizer, 2**31, loss_on="last_answer", template=template, settings=settings, stops=stops
    ).examples
    return [examples[at : at + len(choices)] for at in range(0, len(examples), len(choices))], right


def choose(
    model: CausalModel, questions: Sequence[Sequence[Example]], progress: Callable[[int, int], None] | None = None
) -> list[int]:
    """The most likely choice of each question. The choices of one share its prompt, which is computed once."""
    together = is_exact(model, questions[0])
    chosen = []
    with torch.inference_mode():
        for number, examples in enumerate(questions, 1):
            rows = [examples] if together else [[example] for example in examples]
            scores = [score for row in rows for score in _log_likelihoods(model, row)]
            chosen.append(scores.index(max(scores)))
            if progress:
                progress(number, len(questions))
    return chosen


def _log_likelihoods(model: CausalModel, examples: Sequence[Example]) -> list[float]:
    """The log-likelihood in nats of each example's answer, computed in one row."""
    logits, targets, owner = forward(model, pack(examples))
    losses = cross_entropy(logits.float(), targets, reduction="none")
    return (-torch.zeros(len(examples), device=losses.device).index_add(0, owner.to(losses.device), losses)).tolist()


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
