"""What an answer is worth by the rewards that a recipe declares: functions of its text, its length and its prompt."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_local.durable import digest_bytes
from adapterhub_local.errors import InputError
from adapterhub_local.evaluate.reward_code import check_allowed, load_function
from adapterhub_local.recipe import load_recipe
from adapterhub_local.recipe.reward import REWARDS, Reward, compiled
from adapterhub_local.registry import Version

# (answer, the data's answer, tokens, whether it ended, prompt) -> reward
Worth = Callable[[str, str, int, bool, str], float]


def worth(reward: Reward) -> Worth:
    """The sum of the declared rewards of an answer. Raises InputError for code that may not be run, or cannot."""
    parts = [maker(reward) for maker in (_exact, _regex, _schema, _length, _python)]
    return lambda *answer: sum(part(*answer) for part in parts)


def answer_worth(
    rules: Worth,
    tokenizer: PreTrainedTokenizerBase,
    answer: Sequence[int],
    wanted: Sequence[int],
    ends: Collection[int],
    prompt: Sequence[int],
) -> float:
    """The reward of an answer's ids, beside those of the data; `ends` are the tokens by which one ends."""
    texts = (str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in (answer, wanted, prompt))
    text, reference, asked = texts
    return rules(text, reference, len(answer), bool(answer) and answer[-1] in ends, asked)


def recipe_rewards(path: Path) -> Reward:
    """The rewards of a recipe. Raises BadRecipe, and InputError if it declares none."""
    recipe = load_recipe(path)
    if recipe.train.objective != "grpo":
        raise InputError(
            f"--rewards {path}: its train.objective is '{recipe.train.objective}', and rewards are those of 'grpo'"
        )
    return recipe.reward


def own_rewards(versions: Sequence[Version]) -> Reward | None:
    """The rewards that the first of these versions to be trained by rewards was trained by, None if none was."""
    for version in versions:
        recipe = version.lineage.get("recipe") or {}
        tables: Mapping[str, Any] = recipe.get("resolved") or {}
        if (tables.get("train") or {}).get("objective") == "grpo":
            given = tables.get("reward") or {}
            return Reward(**{one.name: given[one.name] for one in fields(Reward) if given.get(one.name) is not None})
    return None


def declared(reward: Reward) -> dict[str, Any]:
    """The rewards that count, with their weights, and the most tokens of an answer: what a score is kept with."""
    found = {name: getattr(reward, name) for name in REWARDS if getattr(reward, name) is not None}
    weights = {f"{name}_weight": getattr(reward, f"{name}_weight", None) for name in found}
    kept = {name: weight for name, weight in weights.items() if weight not in (None, 1.0)}
    if reward.python is not None:
        found["python"] = digest_bytes(reward.python.encode())
    return {**found, **kept, "max_tokens": reward.max_tokens}


def _exact(reward: Reward) -> Worth:
    value = reward.exact_match or 0.0
    return lambda text, wanted, tokens, ended, prompt: value * (text.strip() == wanted.strip())


def _regex(reward: Reward) -> Worth:
    if reward.regex is None:
        return _nothing
    pattern = compiled(reward.regex)
    return lambda text, wanted, tokens, ended, prompt: reward.regex_weight * bool(pattern.search(text))


def _schema(reward: Reward) -> Worth:
    if reward.json_schema is None:
        return _nothing
    import fastjsonschema

    check = fastjsonschema.compile(json.loads(reward.json_schema))

    def satisfied(text: str, wanted: str, tokens: int, ended: bool, prompt: str) -> float:
        try:
            check(json.loads(text))
        except (ValueError, RecursionError, fastjsonschema.JsonSchemaValueException):
            return 0.0
        return reward.json_schema_weight

    return satisfied


def _length(reward: Reward) -> Worth:
    most = reward.length
    if most is None:
        return _nothing
    return lambda text, wanted, tokens, ended, prompt: reward.length_weight * (ended and tokens <= most)


def _python(reward: Reward) -> Worth:
    if reward.python is None:
        return _nothing
    check_allowed(reward)
    function = load_function(reward.python)
    return lambda text, wanted, tokens, ended, prompt: reward.python_weight * function(prompt, text, wanted)


def _nothing(text: str, wanted: str, tokens: int, ended: bool, prompt: str) -> float:
    return 0.0
