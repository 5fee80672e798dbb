"""What an answer is worth by the rewards that a recipe declares: pure functions of its text and length."""

import json
from collections.abc import Callable

from adapterhub_local.recipe.reward import Reward, compiled

Worth = Callable[[str, str, int, bool], float]  # (answer, the data's answer, tokens, whether it ended) -> reward


def worth(reward: Reward) -> Worth:
    """The sum of the declared rewards of an answer."""
    parts = [maker(reward) for maker in (_exact, _regex, _schema, _length)]
    return lambda text, wanted, tokens, ended: sum(part(text, wanted, tokens, ended) for part in parts)


def _exact(reward: Reward) -> Worth:
    value = reward.exact_match or 0.0
    return lambda text, wanted, tokens, ended: value * (text.strip() == wanted.strip())


def _regex(reward: Reward) -> Worth:
    if reward.regex is None:
        return _nothing
    pattern = compiled(reward.regex)
    return lambda text, wanted, tokens, ended: reward.regex_weight * bool(pattern.search(text))


def _schema(reward: Reward) -> Worth:
    if reward.json_schema is None:
        return _nothing
    import fastjsonschema

    check = fastjsonschema.compile(json.loads(reward.json_schema))

    def satisfied(text: str, wanted: str, tokens: int, ended: bool) -> float:
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
    return lambda text, wanted, tokens, ended: reward.length_weight * (ended and tokens <= most)


def _nothing(text: str, wanted: str, tokens: int, ended: bool) -> float:
    return 0.0
