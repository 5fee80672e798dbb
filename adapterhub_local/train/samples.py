"""A few held-out prompts answered by the base and by the adapter, for people to read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from adapterhub_local.base.load import quiet_loading
from adapterhub_local.base.model import AdaptedModel
from adapterhub_local.rows.examples import Example

LONGEST = 64  # tokens of an answer


@dataclass(frozen=True)
class Sample:
    """One prompt with the answer of the data, of the base and of the adapter, as text."""

    prompt: str
    wanted: str
    base: str
    adapter: str

    def to_json(self, longest: int | None = None) -> dict[str, str]:
        """The four texts, of each the last `longest` letters: what is asked stands at the end of a prompt."""
        return {name: text[-longest:] if longest else text for name, text in asdict(self).items()}


def take_samples(
    model: AdaptedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], count: int
) -> list[Sample]:
    """Greedy answers to the first `count` prompts; model: PEFT over a base, in evaluation mode."""
    samples = []
    with torch.inference_mode(), quiet_loading():
        for example in examples[:count]:
            start, end = example.spans[-1]
            adapter = _answer(model, tokenizer, example.ids[:start], end - start)
            with model.disable_adapter():
                base = _answer(model, tokenizer, example.ids[:start], end - start)
            prompt, wanted = (_text(tokenizer, part) for part in (example.ids[:start], example.ids[start:end]))
            samples.append(Sample(prompt, wanted, base, adapter))
    return samples


def _answer(model: AdaptedModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], length: int) -> str:
    ids = torch.tensor([list(prompt)], device=model.device)
    stop = model.generation_config.eos_token_id if model.generation_config else None
    settings = GenerationConfig(
        max_new_tokens=min(LONGEST, 2 * length + 8),
        do_sample=False,
        eos_token_id=stop if stop is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return _text(tokenizer, written[0, ids.shape[1] :].tolist())


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
