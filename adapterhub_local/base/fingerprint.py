"""The fingerprint of a base: sha256 over its tensors, config and tokenizer, whatever the files they are in."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adapterhub_local.durable import canonical_json, digest_bytes
from adapterhub_local.lora.write import DTYPE_NAMES, tensor_bytes

# Settings that change with the tool that wrote the config, not with the model.
Record = list[Any]  # name, dtype, shape, digest of the bytes: as JSON holds them
_VOLATILE = ("transformers_version", "_name_or_path", "_model_name_or_path", "use_cache", "torch_dtype")


def tensor_record(name: str, tensor: torch.Tensor) -> Record:
    """[name, dtype, shape, digest of the bytes] of one tensor."""
    return [name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), digest_bytes(tensor_bytes(tensor))]


def fingerprint(tensors: list[Record], config: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """`sha256:<hex>` of a base from the records of its tensors, its transformers config and its tokenizer."""
    return digest_bytes(
        canonical_json(
            {
                "tensors": sorted(tensors),
                "config": {key: value for key, value in config.to_diff_dict().items() if key not in _VOLATILE},
                "tokenizer": tokenizer_digest(tokenizer),
            }
        )
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """`sha256:<hex>` of what decides how text becomes tokens: the tokenizer itself, special ids, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else canonical_json(tokenizer.get_vocab()).decode()
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return digest_bytes(canonical_json([rules, specials, tokenizer.chat_template]))
