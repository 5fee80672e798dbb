"""What the name of a tensor in an adapter's file says: the module, the factor, and what tools have wrapped around it.

PEFT's own form is `base_model.model.<module>.lora_A.weight`. Models that were compiled, checkpointed, sharded or
wrapped twice before they were saved leave words in it that name no module of any model, and so may PEFT's name of the
adapter.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

PREFIX = "base_model.model."
# torch.compile, activation checkpointing, FSDP, DeepSpeed
WRAPPERS = frozenset(["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"])
_KINDS = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_embedding_A": "embedding",
    "lora_embedding_B": "embedding",
    "lora_a": "mlx",
    "lora_b": "mlx",
}
_TOKENS = ("token_adapter", "trainable_tokens_delta")
_MODULE = re.compile(r"[\w.-]+", re.ASCII)
# what multimodal models have around their text model, and what diffusers writes before its names
_TEXT_MODEL = "language_model"
_TOOLS = ("transformer.", "diffusion_model.", "text_encoder.")
_ROUTERS = (".mlp.gate", ".block_sparse_moe.gate", ".mlp.router", ".feed_forward.router")


@dataclass(frozen=True)
class TensorName:
    """What a name says.

    `kind` is "A", "B", "magnitude", "bias" (of B), "embedding", "mlx", "saved" (a whole module), "tokens" (an
    adapter's own rows of embeddings or of the head), "weight" (any other tensor, such as one of the base), or "unknown"
    for a name that none has. `spelled` is the module as the
    file calls it, without PEFT's prefix only; `adapter` is PEFT's name of the adapter, `default` where there is none.
    """

    kind: str
    module: str
    spelled: str
    adapter: str = "default"


@lru_cache(maxsize=8192)  # adapters of one base have the same names, and a server reads one after the other
def parse_name(name: str) -> TensorName:
    """The parts of a tensor's name, wrappers taken away. Never raises."""
    parts = name.split(".")
    start = _skip_prefix(parts)
    body = parts[start:]
    at = next((i for i, part in enumerate(body) if part in _KINDS), None)
    if at is None:
        if tuple(body[-2:]) == _TOKENS or tuple(body[-3:-1]) == _TOKENS:
            return _token_rows(body)
        kind = "saved" if "modules_to_save" in body else "weight"
        module = ".".join(part for part in body if part not in WRAPPERS and part != "base_layer")
        return TensorName(kind if _MODULE.fullmatch(module) else "unknown", module, ".".join(body))
    kind, rest = _KINDS[body[at]], body[at + 1 :]
    if rest and rest[-1] == "bias":
        kind = "bias"
    if rest and rest[-1] in ("weight", "bias"):
        rest = rest[:-1]
    elif kind in ("A", "B"):
        kind = "unknown"  # a factor that PEFT makes ends in .weight
    spelled = ".".join(body[:at])
    module = ".".join(part for part in body[:at] if part not in WRAPPERS)
    if not _MODULE.fullmatch(module):
        return TensorName("unknown", name, name)
    return TensorName(kind, module, spelled, ".".join(rest) or "default")


def tensor_name(module: str, factor: str) -> str:
    """PEFT's name for factor "A" or "B" of a module."""
    return f"{PREFIX}{module}.lora_{factor}.weight"


def magnitude_name(module: str) -> str:
    """PEFT's name for DoRA's lengths of a module."""
    return f"{PREFIX}{module}.lora_magnitude_vector"


def rows_name(module: str) -> str:
    """PEFT's name for an adapter's own rows of a module, embeddings or head."""
    return f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"


def _token_rows(body: list[str]) -> TensorName:
    at = body.index(_TOKENS[0])
    spelled = ".".join(body[:at])
    module = ".".join(part for part in body[:at] if part not in WRAPPERS)
    kind = "tokens" if _MODULE.fullmatch(module) else "unknown"
    return TensorName(kind, module, spelled, ".".join(body[at + 2 :]) or "default")


def _skip_prefix(parts: list[str]) -> int:
    """How many parts are PEFT's prefix, however often, and DDP's `module.`"""
    at = 0
    while True:
        if parts[at : at + 2] == ["base_model", "model"]:
            at += 2
        elif at < len(parts) and (parts[at] in WRAPPERS or parts[at] == "module"):
            at += 1
        else:
            return at


def plain(module: str) -> str:
    """The name without the words for a text model inside of a multimodal one."""
    return ".".join(part for part in module.split(".") if part != _TEXT_MODEL)


def is_router(module: str) -> bool:
    """Whether a module is what routes tokens to the experts of a mixture, by its name."""
    return f".{module}".endswith(_ROUTERS)


def fitted(modules: Collection[str], known: Collection[str]) -> Mapping[str, str]:
    """module -> what the base, whose modules are `known`, calls it; the same where nothing else fits.

    A name that the base does not have may be one of a multimodal model around it, carry a tool's prefix, leave out
    what stands before the layers, or be Mixtral's of before transformers 5; it is taken for the one module that it can
    be.
    """
    wanted = set(known)
    missing = [module for module in modules if module not in wanted]
    if not missing:
        return {module: module for module in modules}
    by_end: dict[str, list[str]] = {}
    for name in wanted:
        for at, letter in enumerate(name):
            if letter == ".":
                by_end.setdefault(name[at + 1 :], []).append(name)
    plainly: dict[str, list[str]] = {}
    for name in wanted:
        plainly.setdefault(plain(name), []).append(name)
    found = {}
    for module in modules:
        names = [module, plain(module), *(module.removeprefix(tool) for tool in _TOOLS if module.startswith(tool))]
        names += [name.replace(".block_sparse_moe.", ".mlp.") for name in names if ".block_sparse_moe." in name]
        exact = next((name for name in names if name in wanted), None)
        ends = [match for name in names for match in (*plainly.get(name, ()), *by_end.get(name, ()))]
        found[module] = exact or (ends[0] if len(set(ends)) == 1 else module)
    return found
