"""Liger's kernels (https://github.com/linkedin/Liger-Kernel, arXiv 2410.10989) for what lies between a base's products.

Norms, rotary embeddings and gated MLPs as one kernel each: fewer launches, and a third less memory kept for the
backward pass. They are taken if the base answers as it does without them. The loss is ours (loss.py).
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from adapterhub_local.base.model import BaseModel, Modules
from adapterhub_local.errors import InputError
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.packing import LEAK, SAME_ROUNDED, forward, pack, rounding

PACKAGE = "liger_kernel"


def use_liger(model: BaseModel, probe: Example, wanted: str) -> str | None:
    """Give a loaded base Liger's kernels where `train.kernels` of the recipe allows; a note on what was done, if any.

    Held against the base's own logits of `probe`, and taken back if they differ by more than rounding explains.
    Raises InputError if `wanted` is `liger` and they cannot be used.
    """
    if wanted == "torch":
        return None
    cannot = why_not(model)
    if cannot and wanted == "auto":
        return None
    with torch.inference_mode(), _taken_back(model) as keep:
        reason = cannot or _tried(model, probe)
        if reason is None:
            keep()
            return "norms, rotary embeddings and MLPs are computed by Liger's kernels"
    if wanted == "liger":
        raise InputError(f"train.kernels = 'liger': {reason}; 'auto' and 'torch' go on without them")
    return f"Liger's kernels are not used: {reason}"


def _tried(model: BaseModel, probe: Example) -> str | None:
    """Apply the kernels; why they may not stay, None if they may."""
    alone = forward(model, pack([probe]))[0].float()
    tolerance = min(max(SAME_ROUNDED, 6 * rounding(model, probe, alone)), LEAK)
    try:
        _apply(model)
        got = forward(model, pack([probe]))[0].float()
    except Exception as error:  # of a library that changes with transformers and Triton: a run goes on without it
        return f"they fail on this base ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    difference = float((got - alone).norm() / alone.norm())
    if difference <= tolerance:  # false for what is not a number
        return None
    return f"they change this base's logits by {difference:.1%}, where rounding explains {tolerance:.1%}"


def why_not(model: BaseModel) -> str | None:
    """Why Liger cannot be tried on this model, None if it can."""
    if model.device.type != "cuda":
        return "they run on a GPU, and the base is not on one"
    if importlib.util.find_spec(PACKAGE) is None:
        return "liger-kernel is not installed: pip install 'adapterhub-local[gpu]'"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger has none for models of type {model.config.model_type}"
    return None


def uses_liger(model: Modules) -> bool:
    """Whether modules of a model compute by Liger's kernels."""
    given = (vars(module).get("forward") for module in model.modules())
    return any((getattr(forward, "__module__", None) or "").startswith(PACKAGE) for forward in given)


def _apply(model: BaseModel) -> None:
    """The kernels of a model type, but for the loss and what else would change the model's own forward."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


@contextmanager
def _taken_back(model: BaseModel) -> Iterator[Callable[[], None]]:
    """Unless the block calls `keep`, what it puts into a model's modules and the files of their code is taken out."""
    places = [vars(module) for module in model.modules()]
    places += [vars(sys.modules[name]) for name in {type(module).__module__ for module in model.modules()}]
    before = [dict(place) for place in places]
    kept: list[bool] = []
    try:
        yield lambda: kept.append(True)
    finally:
        if not kept:
            for place, was in zip(places, before, strict=True):
                for name in place.keys() - was.keys():
                    del place[name]
                place.update(was)
