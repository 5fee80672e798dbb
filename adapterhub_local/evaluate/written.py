"""What a model writes by greedy decoding, and checks of it: a pattern that matches, JSON that is valid."""

import json
import re
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.model import CausalModel
from adapterhub_local.errors import InputError
from adapterhub_local.rows.examples import Example


def write_answers(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The last answer of each example as the model writes it after the prompt, special tokens left out."""
    prompts = [example.ids[: example.spans[-1][0]] for example in examples]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    written = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in batch)
        rows = [[pad] * (width - len(prompts[index])) + list(prompts[index]) for index in batch]
        mask = [[0] * (width - len(prompts[index])) + [1] * len(prompts[index]) for index in batch]
        ids = torch.tensor(rows, device=model.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=_ends(model, tokenizer),
                pad_token_id=pad,
            )
        for index, text in zip(batch, tokenizer.batch_decode(output[:, width:], skip_special_tokens=True), strict=True):
            written[index] = text
        if progress:
            progress(min(start + batch_size, len(order)), len(order))
    return written


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


def _ends(model: CausalModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens that end an answer: the model's and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    return sorted(ends) or None
