"""An adapter brought to a base: its modules called as the base calls them, and the base's own tensors left out."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.shapes import check_shapes, linear_shapes, tied_weights
from adapterhub_local.base.vocabulary import Vocabulary, fit_rows
from adapterhub_local.base.weights import BaseWeights
from adapterhub_local.errors import BadFile
from adapterhub_local.lora.adapter import AdapterFile
from adapterhub_local.lora.names import fitted

_FUSE = "fuse it into the model (PEFT: merge_and_unload) and add that as a base of its own"


def fit(
    adapter: AdapterFile, base: BaseInfo, shapes: Mapping[str, tuple[int, int]] | None = None
) -> tuple[AdapterFile, tuple[str, ...]]:
    """The adapter with the base's names of its modules, and the tensors that were left out as they are the base's.

    `shapes` are the base's linear layers, (out_features, in_features) each, if they are known. Raises Incompatible
    naming the first module that the base does not have in this shape, BadFile for a tensor that is not the base's own.
    """
    known = linear_shapes(base) if shapes is None else shapes
    adapter = renamed_for(adapter, known)
    check_shapes(adapter, base, known)
    if adapter.tokens:
        adapter = fit_rows(adapter, Vocabulary.of_base(base), base.name)
    left_out = check_copies(adapter, base)
    return replace(adapter, copies={}), left_out


def renamed_for(adapter: AdapterFile, known: Mapping[str, object]) -> AdapterFile:
    """The adapter with the names that `known` has for its modules. Raises BadFile if two of them would be one."""
    names = fitted(adapter.modules, known)
    before: dict[str, str] = {}
    for module, name in names.items():
        if name in before:
            raise BadFile(f"{adapter.path}: {before[name]} and {module} are both {name} of the base: which one counts?")
        before[name] = module
    return adapter.renamed(names)


def check_copies(adapter: AdapterFile, base: BaseInfo) -> tuple[str, ...]:
    """The names of the tensors beside the factors, all equal to the base's. Raises BadFile naming one that is not."""
    if not adapter.copies:
        return ()
    weights = BaseWeights(base)
    names = set(weights.names)
    for tensor, wanted in adapter.copies.items():
        name = wanted if wanted in names else fitted([wanted], names)[wanted]
        if name not in names:  # an output head that is the embeddings
            name = tied_weights(base).get(name, name)
        if name not in names:
            raise BadFile(f"{adapter.path}: {tensor!r} is not a LoRA factor, nor a tensor of base '{base.name}'")
        if name in weights.constants:
            raise BadFile(
                f"{adapter.path}: {tensor!r} is a whole weight, which base '{base.name}' holds in 4 bits, so it "
                f"cannot be compared with the base's own: {_FUSE}"
            )
        theirs, ours = adapter.tensor(tensor), weights.read(name)
        if theirs.shape != ours.shape:
            more = theirs.shape[0] - ours.shape[0]
            added = f"it has {more} more rows, as added tokens have" if more > 0 else "its shape differs"
            raise BadFile(f"{adapter.path}: {tensor!r} replaces {name} of base '{base.name}' ({added}): {_FUSE}")
        if not _same(theirs, ours):
            raise BadFile(
                f"{adapter.path}: {tensor!r} replaces {name} of base '{base.name}', and is not equal to it (a whole "
                f"module was trained, or the base is another): {_FUSE}"
            )
    return tuple(sorted(adapter.copies))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one, perhaps rounded from the other."""
    return torch.equal(one.to(other.dtype), other) or torch.equal(one, other.to(one.dtype))
