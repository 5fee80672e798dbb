"""The families of mixtures of experts that can be bases, and what their checkpoints call the parts. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What a family calls an expert's matrices, and the block that experts are in; in transformers 5 it is `mlp`.

    `inner` is the setting that says how wide an expert is.
    """

    architecture: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    block: str = "mlp"
    inner: str = "moe_intermediate_size"


# by transformers' model_type
FAMILIES = {
    "qwen3_moe": Family("Qwen3MoeForCausalLM"),
    "qwen2_moe": Family("Qwen2MoeForCausalLM"),
    "mixtral": Family("MixtralForCausalLM", "w1", "w3", "w2", "block_sparse_moe", "intermediate_size"),
    "olmoe": Family("OlmoeForCausalLM", inner="intermediate_size"),
}
ARCHITECTURES = frozenset(family.architecture for family in FAMILIES.values())


def checkpoint_name(name: str, model_type: str) -> str:
    """What checkpoints of a family call one of the model's tensors; the same where nothing differs."""
    family = FAMILIES.get(model_type)
    return name if family is None else name.replace(".mlp.", f".{family.block}.")
