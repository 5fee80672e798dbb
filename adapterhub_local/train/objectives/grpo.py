"""GRPO: answers that the model draws itself, each compared with the others to its prompt (arXiv 2402.03300).

Answers are drawn by the very model that is trained, in the same process and over the same base, just before the step
that learns from them; so each step is on its own policy, and the ratio of the paper's Eq. 3 is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from adapterhub_local.base.model import AdaptedModel
from adapterhub_local.errors import InputError
from adapterhub_local.recipe import Recipe
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.packing import is_exact, pack
from adapterhub_local.train.loss import answer_log_probs, output_head
from adapterhub_local.train.objectives.objective import Sum
from adapterhub_local.train.objectives.rewards import worth

MAX_PROMPTS = 64  # answers that are drawn at once


@dataclass(frozen=True)
class PromptRow:
    """One example of the data: its prompt is answered, its answer is what an exact match is with."""

    example: Example

    @property
    def num_tokens(self) -> int:
        return len(self.example.ids)


@dataclass(frozen=True)
class Drawn:
    """The answers to one prompt as examples, and their rewards (samples,) float32."""

    answers: list[Example]
    rewards: torch.Tensor

    @property
    def advantages(self) -> torch.Tensor:
        """How much better than the mean of its group each is, in standard deviations (Eq. 3)."""
        return (self.rewards - self.rewards.mean()) / (self.rewards.std(correction=0) + 1e-4)


@dataclass(frozen=True)
class Step:
    """What all rows of a step know: the answers to each prompt, and the tokens of all of them."""

    drawn: dict[int, Drawn]
    tokens: int


class Grpo:
    """-A log pi of each token of a drawn answer, a mean over all tokens of the step (arXiv 2503.14476, Eq. 8)."""

    metrics = ("reward", "reward_deviation", "answer_tokens")
    may_rest = True  # all answers of a step may be worth the same

    def __init__(
        self,
        model: AdaptedModel,
        examples: Sequence[Example],
        recipe: Recipe,
        world_size: int,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        if world_size > 1:
            raise InputError("train.objective = 'grpo' draws answers in one process: leave out --nproc and torchrun")
        self.model, self.given, self.tokenizer = model.eval(), recipe.reward, tokenizer
        self.worth = worth(recipe.reward)
        self.head = output_head(model, examples[0])
        has_dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
        self.shares = not has_dropout and is_exact(model, examples[:2])

    def rows(self, batch: Sequence[Example]) -> list[PromptRow]:
        return [PromptRow(example) for example in batch]

    def begin(self, rows: Sequence[PromptRow], own: Sequence[PromptRow], total: Sum) -> Step:
        drawn = self._draw([row.example for row in rows], self.given.samples)
        tokens = sum(answer.num_labels for one in drawn for answer in one.answers)
        return Step({id(row): one for row, one in zip(rows, drawn, strict=True)}, tokens)

    def loss(self, row: PromptRow, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = step.drawn[id(row)]
        packs = [pack(drawn.answers)] if self.shares else [pack([answer]) for answer in drawn.answers]
        probs = torch.cat([answer_log_probs(self.model, one, self.head, int(one.segments.max())) for one in packs])
        loss = -(drawn.advantages.to(probs.device) * (probs - probs.detach())).sum() / step.tokens
        lengths = torch.tensor([float(answer.num_labels) for answer in drawn.answers]).mean()
        told = torch.stack([drawn.rewards.mean(), drawn.rewards.std(correction=0), lengths])
        return loss, told / len(step.drawn)

    def held_out(self, items: Sequence[Example], batch_size: int) -> dict[str, float]:
        """`eval_loss` is less the mean reward of greedy answers."""
        rewards = torch.cat([one.rewards for one in self._draw(items, 1)])
        return {"eval_loss": -float(rewards.mean()), "eval_reward": float(rewards.mean())}

    def _draw(self, examples: Sequence[Example], samples: int) -> list[Drawn]:
        """`samples` answers to the prompt of each example by the model as it is; a single one is the likeliest."""
        was_training = self.model.training
        self.model.eval()
        prompts = [example.ids[: example.spans[-1][0]] for example in examples for _ in range(samples)]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), MAX_PROMPTS):
            batch = order[start : start + MAX_PROMPTS]
            for index, answer in zip(batch, self._generate([prompts[at] for at in batch], samples > 1), strict=True):
                answers[index] = answer
        self.model.train(was_training)
        return [
            self._judged(example, answers[at * samples : (at + 1) * samples]) for at, example in enumerate(examples)
        ]

    def _generate(self, prompts: Sequence[Sequence[int]], is_drawn: bool) -> list[list[int]]:
        """The ids of an answer to each prompt, up to what ends it or `max_tokens`."""
        device, ends = self.model.device, self._ends()
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else ends[0]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        drawn = {"temperature": self.given.temperature, "top_k": 0} if is_drawn else {}
        settings = GenerationConfig(
            max_new_tokens=self.given.max_tokens, do_sample=is_drawn, eos_token_id=ends, pad_token_id=pad, **drawn
        )
        with torch.no_grad():
            written = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        found = []
        for row in written[:, width:].tolist():
            end = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
            found.append(row[:end])
        return found

    def _ends(self) -> list[int]:
        own = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        return sorted(int(end) for end in ends)

    def _judged(self, example: Example, answers: Sequence[list[int]]) -> Drawn:
        start, end = example.spans[-1]
        wanted = str(self.tokenizer.decode(list(example.ids[start:end]), skip_special_tokens=True))
        prompt, ends = example.ids[:start], set(self._ends())
        made = [Example((*prompt, *answer), ((start, start + len(answer)),)) for answer in answers]
        rewards = [
            self.worth(
                str(self.tokenizer.decode(answer, skip_special_tokens=True)), wanted, len(answer), answer[-1] in ends
            )
            for answer in answers
        ]
        return Drawn(made, torch.tensor(rewards, dtype=torch.float32))
