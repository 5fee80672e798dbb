"""What a model writes by greedy decoding, and checks of it: a pattern that matches, JSON that is valid."""

import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.model import CausalModel
from adapterhub_local.errors import InputError
from adapterhub_local.rows.examples import Example


def write_ids(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The ids of the last answer of each example as the model writes it after the prompt, with the token that ends it,
    if one does within `max_new_tokens`.

    What all prompts begin with, such as the tools they offer, is computed once.
    """
    ends = ends_of(model, tokenizer)
    prompts = [example.ids[: example.spans[-1][0]] for example in examples]
    may_share = len(prompts) > 1 and _sees_all(model)
    prefix = list(os.path.commonprefix([prompt[:-1] for prompt in prompts])) if may_share else []
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    written: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in batch)
        rests = [list(prompts[index][len(prefix) :]) for index in batch]
        pads = [width - len(prefix) - len(rest) for rest in rests]
        ids = torch.tensor(
            [prefix + [pad] * count + rest for count, rest in zip(pads, rests, strict=True)], device=model.device
        )
        mask = [[1] * len(prefix) + [0] * count + [1] * len(rest) for count, rest in zip(pads, rests, strict=True)]
        with torch.inference_mode():
            first = torch.tensor([prefix], device=model.device)
            known = prefill(model, first, torch.ones_like(first), len(batch)) if prefix else None
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=ends or None,
                pad_token_id=pad,
                **({} if known is None else {"past_key_values": known}),
            )
        for index, ids_of in zip(batch, output[:, width:].tolist(), strict=True):
            end = next((at + 1 for at, token in enumerate(ids_of) if token in ends), len(ids_of))
            written[index] = ids_of[:end]
        if progress:
            progress(min(start + batch_size, len(order)), len(order))
    return written


def _sees_all(model: CausalModel) -> bool:
    """Whether every layer attends to all tokens before: padding behind a beginning would move it out of a window."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    return kinds == {"full_attention"} and not getattr(config, "sliding_window", None)


def prefill(model: CausalModel, ids: torch.Tensor, mask: torch.Tensor, copies: int) -> Any:
    """What a model keeps of ids (rows, tokens), padded at the left as `mask` says, `copies` times for each row."""
    known: Any = model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=True,
        logits_to_keep=1,
    ).past_key_values  # fmt: skip
    known.batch_repeat_interleave(copies)
    return known


def read_pattern(text: str) -> re.Pattern[str]:
    """A regular expression. Raises InputError."""
    try:
        return re.compile(text)
    except re.error as error:
        raise InputError(f"--regex {text!r} is not a regular expression: {error}") from None


def matches(pattern: re.Pattern[str], written: str, reference: str) -> bool:
    """Whether the pattern is found in what was written; if it has groups, with those it finds in the reference."""
    found = pattern.search(written)
    if found is None or not pattern.groups:
        return found is not None
    wanted = pattern.search(reference)
    return wanted is not None and found.groups() == wanted.groups()


def is_json(text: str) -> bool:
    """Whether a text is JSON and nothing else."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def ends_of(model: CausalModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the model's and the tokenizer's."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    return sorted(int(end) for end in ends if end is not None)
