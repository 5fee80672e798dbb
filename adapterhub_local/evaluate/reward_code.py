"""A reward that is a function of the user's own: `reward.python` of a recipe, run only where that was allowed.

A recipe may come from anybody and holds no code by itself, so its file runs only with `--allow-code` (or
QHUB_ALLOW_CODE=1). What runs is the text that the recipe was read with, which is kept with the version.
"""

import math
import traceback
from collections.abc import Callable
from numbers import Real
from typing import Any

from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.recipe.reward import FUNCTION, Reward
from adapterhub_local.settings import allows_code

FILE = "<reward.python>"


def check_allowed(reward: Reward) -> None:
    """Raise InputError where a reward is Python code and running it was not allowed."""
    if reward.python is not None and not allows_code():
        raise InputError("reward.python is Python code, which runs as you: read it, then add --allow-code")


def load_function(source: str) -> Callable[[str, str, str], float]:
    """The function of a prompt, an answer and the data's answer in `source`, which is run here.

    Raises InputError if there is none, and QhubError later if it raises or gives what is not a finite number.
    """
    space: dict[str, Any] = {"__name__": "reward", "__file__": FILE}
    try:
        exec(compile(source, FILE, "exec"), space)  # noqa: S102 - allowed by the user (check_allowed)
    except (Exception, SystemExit) as error:
        raise InputError(f"reward.python cannot be run: {_reason(error)}") from None
    function, named = space.get(FUNCTION), f"reward.python: {FUNCTION}()"
    if not callable(function):
        raise InputError(f"reward.python has no function '{FUNCTION}(prompt, answer, wanted)'")

    def value(prompt: str, answer: str, wanted: str) -> float:
        try:
            found = function(prompt, answer, wanted)
        except (Exception, SystemExit) as error:
            raise QhubError(f"{named} failed for the answer {answer[:60]!a}: {_reason(error)}") from None
        if not isinstance(found, Real) or not math.isfinite(found):
            raise QhubError(f"{named} returned {found!r:.60} for the answer {answer[:60]!a}, which is not a number")
        return float(found)

    return value


def _reason(error: BaseException) -> str:
    """What went wrong, and in which of its lines."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == FILE]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    message = error.msg if isinstance(error, SyntaxError) else error
    return f"{type(error).__name__}: {message}" + (f" (line {line})" if line else "")
