"""GRPO: answers that the model draws itself, each compared with the others to its prompt (arXiv 2402.03300).

Answers are drawn by the very model that is trained, in the same process and over the same base, just before the step
that learns from them; so each step is on its own policy, and the ratio of the paper's Eq. 3 is one. The serving engine
draws them; where it cannot, transformers does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.model import AdaptedModel
from adapterhub_local.counts import counted
from adapterhub_local.errors import Incompatible, InputError
from adapterhub_local.evaluate.rewards import answer_worth, worth
from adapterhub_local.evaluate.written import ends_of, prefill
from adapterhub_local.recipe import Recipe
from adapterhub_local.recipe.derived import examples_a_row
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.packing import is_exact_row, pack, pack_groups
from adapterhub_local.train.loss import answer_log_probs, output_head
from adapterhub_local.train.objectives.drawing import Draw, Drawer
from adapterhub_local.train.objectives.objective import Sum

MAX_ANSWERS = 64  # that are drawn at once


@dataclass(frozen=True)
class PromptRow:
    """Examples of the data whose answers are computed together: prompts are answered, and an exact match is with the
    data's answers."""

    examples: tuple[Example, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)


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
    """What all rows of a step know: the answers to the prompts of each, the number of prompts, the answers' tokens."""

    drawn: dict[int, list[Drawn]]  # by the id of the row
    prompts: int
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
        info: BaseInfo | None = None,
    ) -> None:
        assert world_size == 1, "answers are drawn in one process (train/check.py)"
        self.model, self.given, self.tokenizer = model.eval(), recipe.reward, tokenizer
        _check_length(recipe, examples)
        self.worth = worth(recipe.reward)
        self.head = output_head(model, examples[0])
        has_dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
        groups = [_answered(example, examples[0]) for example in examples[:2]]
        self.room, self.size = recipe.train.packed_tokens, examples_a_row(recipe.train, world_size)
        self.is_grouped = not has_dropout and is_exact_row(model, [one for group in groups for one in group],
                                                           pack_groups(groups))  # fmt: skip
        self.is_paired = self.is_grouped or (not has_dropout and is_exact_row(model, groups[0], pack(groups[0])))
        self.ends = tuple(ends_of(model, tokenizer))
        self.drawer, self.notes = self._drawer(examples, recipe.data.max_length, info)

    def rows(self, batch: Sequence[Example]) -> list[PromptRow]:
        """As many prompts a row as fit with their answers, however long these become."""
        rows: list[list[Example]] = []
        room = 0
        for example in batch:
            size = example.spans[-1][0] + self.given.samples * self.given.max_tokens
            if not self.is_grouped or size > room or len(rows[-1]) >= self.size:
                rows.append([])
                room = self.room
            rows[-1].append(example)
            room -= size
        return [PromptRow(tuple(row)) for row in rows]

    def begin(self, rows: Sequence[PromptRow], own: Sequence[PromptRow], total: Sum) -> Step:
        found = self._draw([example for row in rows for example in row.examples], self.given.samples)
        tokens = sum(answer.num_labels for one in found for answer in one.answers)
        drawn, given = {}, iter(found)
        for row in rows:
            drawn[id(row)] = [next(given) for _ in row.examples]
        return Step(drawn, len(found), tokens)

    def loss(self, row: PromptRow, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = step.drawn[id(row)]
        groups = [one.answers for one in drawn]
        if self.is_grouped:
            packs = [pack_groups(groups)]
        elif self.is_paired:
            packs = [pack(group) for group in groups]
        else:
            packs = [pack([answer]) for group in groups for answer in group]
        probs = torch.cat([answer_log_probs(self.model, one, self.head, int(one.segments.max())) for one in packs])
        advantages = torch.cat([one.advantages for one in drawn]).to(probs.device)
        # by value less the mean reward, as on held-out prompts; by gradient the paper's
        loss = -(advantages * (probs - probs.detach())).sum() / step.tokens
        loss = loss - sum(float(one.rewards.mean()) for one in drawn) / step.prompts
        metrics = torch.zeros(len(self.metrics))
        for one in drawn:
            lengths = torch.tensor([float(answer.num_labels) for answer in one.answers]).mean()
            metrics += torch.stack([one.rewards.mean(), one.rewards.std(correction=0), lengths])
        return loss, metrics / step.prompts

    def held_out(self, items: Sequence[Example], batch_size: int) -> dict[str, float]:
        """`eval_loss` is less the mean reward of greedy answers."""
        rewards = torch.cat([one.rewards for one in self._draw(items, 1)])
        return {"eval_loss": -float(rewards.mean()), "eval_reward": float(rewards.mean())}

    def _drawer(
        self, examples: Sequence[Example], max_length: int, info: BaseInfo | None
    ) -> tuple[Drawer | None, tuple[str, ...]]:
        """What draws by the serving engine, None where it cannot, and why."""
        if info is None:
            return None, ()
        longest = max(example.spans[-1][0] for example in examples)
        try:
            how, tokens = self._how(self.given.samples), max_length + self.given.max_tokens
            return Drawer(self.model, info, self.tokenizer, how, longest, tokens), ()
        except (Incompatible, InputError) as error:
            return None, (f"answers are drawn by transformers, not by the serving engine: {error}",)

    def _how(self, samples: int) -> Draw:
        return Draw(samples, self.given.max_tokens, self.given.temperature if samples > 1 else 0.0, self.ends)

    def _draw(self, examples: Sequence[Example], samples: int) -> list[Drawn]:
        """`samples` answers to the prompt of each example by the model as it is; a single one is the likeliest."""
        prompts = [example.ids[: example.spans[-1][0]] for example in examples]
        if self.drawer is not None:
            found = self.drawer.draw(prompts, self._how(samples))
            return [self._judged(*each) for each in zip(examples, found, strict=True)]
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        drawn: dict[int, Drawn] = {}
        at_once = max(1, MAX_ANSWERS // samples)
        for start in range(0, len(order), at_once):
            batch = order[start : start + at_once]
            answers = self._generate([prompts[index] for index in batch], samples, is_drawn=samples > 1)
            for number, index in enumerate(batch):
                drawn[index] = self._judged(examples[index], answers[number * samples : (number + 1) * samples])
        self.model.train(was_training)
        return [drawn[index] for index in range(len(examples))]

    def _generate(self, prompts: Sequence[Sequence[int]], samples: int, *, is_drawn: bool) -> list[list[int]]:
        """The ids of `samples` answers to each prompt, prompt after prompt, up to what ends them or `max_tokens`.

        A prompt is computed once for all of its answers. Without `is_drawn` each token is the likeliest.
        """
        device, ends = self.model.device, list(self.ends)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else ends[0]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        drawn = {"temperature": self.given.temperature, "top_k": 0} if is_drawn else {}
        settings = GenerationConfig(
            max_new_tokens=self.given.max_tokens, do_sample=is_drawn, eos_token_id=ends, pad_token_id=pad, **drawn
        )
        given: dict[str, Any] = {}
        with torch.no_grad():
            if samples > 1 and width > 1:  # all but the last token, from which the first of each answer is drawn
                given["past_key_values"] = prefill(self.model, ids[:, :-1], mask[:, :-1], samples)
            ids, mask = ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
            written = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **given)
        found = []
        for row in written[:, width:].tolist():
            end = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
            found.append(row[:end])
        return found

    def _judged(self, example: Example, answers: Sequence[list[int]]) -> Drawn:
        start, end = example.spans[-1]
        prompt = example.ids[:start]
        made = [Example((*prompt, *answer), ((start, start + len(answer)),)) for answer in answers]
        wanted = example.ids[start:end]
        rewards = [answer_worth(self.worth, self.tokenizer, answer, wanted, self.ends, prompt) for answer in answers]
        return Drawn(made, torch.tensor(rewards, dtype=torch.float32))


def _check_length(recipe: Recipe, examples: Sequence[Example]) -> None:
    """Raise InputError where no drawn answer could ever be the data's: a run would find out at its end."""
    shortest = min(end - start for start, end in (example.spans[-1] for example in examples)) - 1  # less its stop
    given = recipe.reward
    others = (given.regex, given.json_schema, given.length, given.python)
    if given.exact_match and given.max_tokens < shortest and all(one is None for one in others):
        raise InputError(
            f"{recipe.place('reward.max_tokens')} = {given.max_tokens}: the shortest answer of the data has "
            f"{counted(shortest, 'token')}, so none that is drawn could be an exact match"
        )


def _answered(example: Example, other: Example) -> list[Example]:
    """The prompt of an example with its own answer, and with that of another."""
    start, end = other.spans[-1]
    prompt = example.ids[: example.spans[-1][0]]
    ids = (*prompt, *other.ids[start:end])
    own = Example(example.ids[: example.spans[-1][1]], (example.spans[-1],))
    return [own, Example(ids, ((len(prompt), len(ids)),))]
