"""Unsupported: parameters of other servers that are none here, and the values of them that ask for nothing."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

# Parameters that are not supported, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1.0,),
    "modalities": (["text"],),
    "priority": (0,),
    "reasoning_effort": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Parameters that cannot change the answer.
IGNORED = frozenset(
    [
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
    ]
)
# Parameters that are spelled differently here.
RENAMED = {
    "guided_json": "response_format",
    "guided_regex": "structured_outputs",
    "guided_choice": "structured_outputs",
    "guided_grammar": "structured_outputs",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "lora": "adapters",
    "lora_path": "adapters",
    "adapter_id": "adapters",
}


def refuse_unsupported(extra: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise PydanticCustomError about the first of `extra` that would change the answer."""
    for name, value in extra.items():
        if value is None or name in IGNORED or value in NEUTRAL.get(name, ()):
            continue
        if name in NEUTRAL:
            raise PydanticCustomError(
                "unsupported", "this parameter is not supported: leave it out", {"param": name[:80]}
            )
        near = [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name[:80], [*known, *NEUTRAL], n=1)
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        raise PydanticCustomError("unknown", f"there is no such parameter: {hint}", {"param": name[:80]})
