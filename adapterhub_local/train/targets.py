"""Which linear layers an adapter changes: all, those of attention, those of the MLPs, or a list of names."""

from collections.abc import Sequence

import torch

from adapterhub_local.base.model import BaseModel
from adapterhub_local.base.modules import ALL_LINEAR, GROUPS, chosen_modules
from adapterhub_local.errors import InputError


def target_names(model: BaseModel, wanted: str | Sequence[str]) -> str | list[str]:
    """What PEFT is given for a recipe's `target_modules`. Raises InputError naming what matches nothing.

    model: a causal language model without an adapter. A group becomes the ends of its modules' names, as
    short as they can be without matching a module outside it.
    """
    if wanted == ALL_LINEAR:
        return wanted
    head = model.get_output_embeddings()
    linear = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    ]
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    found: set[str] = set()
    for name in names:
        chosen = chosen_modules(linear, name)
        if not chosen:
            leaves = sorted({module.rpartition(".")[2] for module in linear})
            raise InputError(
                f"adapter.target_modules: '{name}' is not a linear layer of the base ({type(model).__name__}); "
                f"it has {', '.join(leaves)}, and the groups {', '.join(GROUPS)}"
            )
        found |= _short(chosen, set(linear) - set(chosen)) if name in GROUPS else {name}
    return sorted(found)


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith("." + name)


def _short(chosen: Sequence[str], others: set[str]) -> set[str]:
    """The last part of each name; the last two where one would match another module as well."""
    ends = {module.rpartition(".")[2] for module in chosen}
    ambiguous = {end for end in ends if any(_ends(other, end) for other in others)}
    longer = {".".join(module.split(".")[-2:]) for module in chosen if module.rpartition(".")[2] in ambiguous}
    return (ends - ambiguous) | longer
