"""Unsupported: parameters of other servers that this one does not have, and their values that ask for nothing.

One question decides: would it change the answer? What cannot is taken, what would is refused by name.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

from serve.requests.body_part import is_empty

# Parameters that are not supported, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),  # of a chat, whose template writes them
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (),
    "best_of": (1,),
    "bos_token": (),
    "cfg_scale": (1,),
    "context_management": (),
    "documents": (),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "echo": (False,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "function_call": ("none", "auto"),
    "functions": (),
    "grammar": (),
    "guidance_scale": (1,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": (),
    "mirostat": (0,),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "models": (),
    "moderation": (),
    "n_keep": (0,),
    "n_probs": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "plugins": (),
    "post_sampling_probs": (False,),
    "priority": (0,),
    "repeat_penalty": (1,),
    "response_fields": (),
    "return_progress": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "smoothing_factor": (0,),
    "spaces_between_special_tokens": (True,),
    "suffix": (),
    "tfs_z": (1,),
    "timings_per_token": (False,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "transforms": (),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("low", "medium"),  # no model here is more talkative than it was asked to be
    "web_search_options": (),
    "xtc_probability": (0,),
}
# Parameters that cannot change the answer: names and times of clients, accounting, caches, where it runs and is kept;
# and the details of samplers that only count where a parameter above turns them on.
IGNORED = frozenset(
    [
        "access_programs",
        "cache_prompt",
        "chat_id",
        "client_id",
        "client_metadata",
        "conversation_id",
        "created",
        "created_at",
        "dry_allowed_length",
        "dry_base",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "extra_headers",
        "id",
        "id_slot",
        "keep_alive",
        "kv_transfer_params",
        "max_tool_calls",
        "message_id",
        "metadata",
        "mirostat_eta",
        "mirostat_tau",
        "parent_id",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "provider",
        "repeat_last_n",
        "request_id",
        "safety_identifier",
        "service_tier",
        "session_id",
        "slot_id",
        "store",
        "thread_id",
        "timestamp",
        "trace_id",
        "trace_headers",
        "usage",
        "user_id",
        "xtc_threshold",
    ]
)
# Parameters that are spelled differently here.
RENAMED = {
    "guided_json": "response_format",
    "guided_regex": "structured_outputs",
    "guided_choice": "structured_outputs",
    "guided_grammar": "structured_outputs",
    "grammar": "structured_outputs",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "lora": "adapters",
    "lora_path": "adapters",
    "adapter_id": "adapters",
}


def refuse_unsupported(extra: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise PydanticCustomError about the first of `extra` that would change the answer."""
    for name, value in extra.items():
        if is_empty(value) or name in IGNORED or value in NEUTRAL.get(name, ()):
            continue
        if name in NEUTRAL and name not in RENAMED:
            raise PydanticCustomError(
                "unsupported", "this parameter is not supported: leave it out", {"param": name[:80]}
            )
        near = [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name[:80], [*known, *NEUTRAL], n=1)
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        raise PydanticCustomError("unknown", f"there is no such parameter: {hint}", {"param": name[:80]})
