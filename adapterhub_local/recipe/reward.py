"""What answers that a model writes itself are rewarded for, and how they are drawn (`train.objective = "grpo"`)."""

import ast
import json
from dataclasses import dataclass
from typing import Any

from adapterhub_local.recipe.field import at_least_one, between, key

REWARDS = ("exact_match", "regex", "json_schema", "length", "python")
FUNCTION = "reward"  # of a Python file


def compiled(pattern: str) -> Any:
    """A pattern of RE2, whose time is linear in the text. Raises ValueError with what is wrong with it."""
    import re2

    options = re2.Options()
    options.log_errors = False  # else it writes to standard error by itself
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0] if error.args else error
        raise ValueError(reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)) from None


def _pattern(value: str) -> str | None:
    try:
        compiled(value)
    except ValueError as error:
        return f"is not a pattern of RE2: {error}"
    return None


def _schema(value: str) -> str | None:
    import fastjsonschema

    try:
        schema = json.loads(value)
    except ValueError as error:
        return f"is not JSON: {error}"
    try:
        fastjsonschema.compile(schema)
    except (fastjsonschema.JsonSchemaException, TypeError, AttributeError) as error:
        return f"is not a JSON schema: {error}"
    return None


def code_problem(source: str) -> str | None:
    """Why Python cannot read `source`, which is not run for that."""
    try:
        ast.parse(source)
    except SyntaxError as error:
        return f"is not Python: {error.msg} (line {error.lineno})"
    except (ValueError, RecursionError, MemoryError) as error:  # a NUL, or too deep
        return f"is not Python: {error or type(error).__name__}"
    return None


@dataclass(frozen=True)
class Reward:
    exact_match: float | None = key(
        "reward of an answer that is the data's, blanks at its ends apart", None, between(-100, 100)
    )
    regex: str | None = key("a pattern (RE2) that an answer is rewarded for if it is found in it", None, _pattern)
    regex_weight: float = key("the reward of `regex`", 1.0, between(-100, 100))
    json_schema: str | None = key(
        "a JSON schema, as text, that an answer is rewarded for if it is JSON that satisfies it", None, _schema
    )
    json_schema_weight: float = key("the reward of `json_schema`", 1.0, between(-100, 100))
    length: int | None = key("tokens within which an answer that ends is rewarded", None, at_least_one)
    length_weight: float = key("the reward of `length`", 1.0, between(-100, 100))
    python: str | None = key(
        f"a Python file, relative to the recipe, whose function `{FUNCTION}(prompt, answer, wanted)` gives a number; "
        "kept with the version, and run only with --allow-code",
        None,
    )
    python_weight: float = key("what the number of `python` is multiplied by", 1.0, between(-100, 100))
    samples: int = key("answers drawn to each prompt, which are compared with each other", 8, between(2, 256))
    max_tokens: int = key("most tokens of a drawn answer", 64, between(1, 2**16))
    temperature: float = key("of the distribution that answers are drawn from", 1.0, between(0.01, 10))


def check_reward(objective: str, reward: Any, given: set[str]) -> list[tuple[str, str, str]]:
    """What does not fit between a recipe's objective and its [reward]: (table, key, message)."""
    keys = sorted(name.partition(".")[2] for name in given if name.startswith("reward."))
    if objective != "grpo":
        return [("reward", name, f"reward.{name} is for train.objective = grpo, not '{objective}'") for name in keys]
    if reward is None:
        return []
    declared = [name for name in REWARDS if getattr(reward, name) is not None]
    if not declared:
        known = ", ".join(f"reward.{name}" for name in REWARDS)
        message = f"train.objective = 'grpo' needs a reward: give one of {known}"
        return [("train", "objective", message)]
    problems = []
    for name in REWARDS:
        weight = f"{name}_weight"
        if weight in keys and name not in declared:
            problems.append(("reward", weight, f"reward.{weight} is for reward.{name}, which is not given"))
    if not any(getattr(reward, f"{name}_weight", reward.exact_match) for name in declared):
        named = declared[0] if declared[0] == "exact_match" else f"{declared[0]}_weight"
        problems.append(("reward", named, f"reward.{named} = 0: every answer would be worth the same, nothing"))
    return problems
