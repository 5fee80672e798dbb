"""Which modules of a base are quantised linear layers, by the file's header; checks a recipe's targets. No torch."""

import difflib
import re
from collections.abc import Iterable, Sequence

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.quantisation import MARKS
from adapterhub_local.errors import BadFile, Corrupt, InputError, NotFound
from adapterhub_local.lora.header import read_header
from adapterhub_local.lora.pattern import compile_pattern, matches_end

# what the architectures call the parts of a layer: self_attn (Llama, Mistral, Qwen, Gemma, Phi-3),
# self_attention (Falcon), attention (GPT-NeoX), attn (GPT-2); feed_forward in a few
GROUPS = {
    "attention": re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)\."),
    "mlp": re.compile(r"(^|\.)(mlp|feed_forward)\."),
}
ALL_LINEAR = "all-linear"


def linear_modules(info: BaseInfo) -> list[str]:
    """The names of the layers that adapters can change, such as `model.layers.0.self_attn.q_proj`. Raises Corrupt."""
    try:
        headers = [read_header(path) for path in sorted(info.folder.glob("*.safetensors"))]
    except (BadFile, NotFound) as error:
        raise Corrupt(f"base '{info.name}' cannot be read: {error}") from None
    names = (name for header in headers for name in header.tensors if name.endswith(MARKS))
    return [name.rpartition(".weight.")[0] for name in names]


def chosen_modules(modules: Sequence[str], target: str) -> list[str]:
    """Those of `modules` that one target names: `all-linear`, a group, or the end of a name."""
    if target == ALL_LINEAR:
        return list(modules)
    group = GROUPS.get(target)
    return [name for name in modules if (group.search(name) if group else f".{name}".endswith(f".{target}"))]


def check_targets(info: BaseInfo, targets: str | tuple[str, ...]) -> None:
    """Raises InputError for a target that names no module: PEFT would say so only if none does."""
    modules = linear_modules(info)
    ends = sorted({module.rpartition(".")[2] for module in modules})
    for target in sorted({targets} if isinstance(targets, str) else set(targets)):
        if not chosen_modules(modules, target):
            if target in ("gate", "router") and any(".experts." in module for module in modules):
                raise InputError(
                    f"'{target}' routes tokens to the experts of base '{info.name}' and is not trained: "
                    f"there are {', '.join(ends)}"
                )
            near = difflib.get_close_matches(target, ends, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(ends)}"
            raise InputError(f"base '{info.name}' has no linear module '{target}': {hint}")


def check_patterns(info: BaseInfo, targets: str | tuple[str, ...], patterns: Iterable[str]) -> None:
    """Raises InputError for a pattern (PEFT's: a regular expression for the end of a name) that matches no module that
    `targets` name, or is not taken, as an adapter's own pattern would not be."""
    named = [targets] if isinstance(targets, str) else targets
    modules = {module for target in named for module in chosen_modules(linear_modules(info), target)}
    for pattern in patterns:
        try:
            compile_pattern(pattern)
        except ValueError as error:
            raise InputError(str(error)) from None
        if not any(matches_end(pattern, module) for module in modules):
            raise InputError(f"'{pattern}' is not the end of any module that adapter.target_modules names")
