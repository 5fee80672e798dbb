"""Which modules of a base are quantised linear layers, by the file's header; checks a recipe's targets. No torch."""

import difflib

from adapterhub_local.base.store import BaseInfo
from adapterhub_local.errors import BadFile, Corrupt, InputError, NotFound
from adapterhub_local.lora.header import read_header

GROUPS = ("all-linear", "attention", "mlp")  # names for many modules
MARK = ".weight.quant_state.bitsandbytes__nf4"


def linear_modules(info: BaseInfo) -> list[str]:
    """The names of the layers that adapters can change, such as `model.layers.0.self_attn.q_proj`. Raises Corrupt."""
    try:
        headers = [read_header(path) for path in sorted(info.folder.glob("*.safetensors"))]
    except (BadFile, NotFound) as error:
        raise Corrupt(f"base '{info.name}' cannot be read: {error}") from None
    return [name.removesuffix(MARK) for header in headers for name in header.tensors if name.endswith(MARK)]


def check_targets(info: BaseInfo, targets: str | tuple[str, ...]) -> None:
    """Raises InputError for a target that is the end of no module's name: PEFT would say so only if none is."""
    if isinstance(targets, str):
        return
    modules = linear_modules(info)
    ends = sorted({module.rpartition(".")[2] for module in modules})
    for target in sorted(set(targets) - set(GROUPS)):
        if not any(module == target or module.endswith(f".{target}") for module in modules):
            near = difflib.get_close_matches(target, ends, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(ends)}"
            raise InputError(f"adapter.target_modules: base '{info.name}' has no linear module '{target}': {hint}")
