"""Rank adapters by their loss on given examples: many adapters in one row of tokens, one pass over the base for all.

Each adapter has its own copy of the examples in the row, and its factors are added to what the base computes of just
these tokens; so the base's weights are unpacked once, however many adapters are asked. What cannot be added so (DoRA,
an output head) is scored by plain PEFT, one after the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from adapterhub_local.base.experts import Experts
from adapterhub_local.base.load import LoadedBase
from adapterhub_local.base.model import Modules
from adapterhub_local.errors import BadFile
from adapterhub_local.evaluate.evaluate import score_folder
from adapterhub_local.evaluate.metrics import evaluate
from adapterhub_local.lora.adapter import Delta, open_adapter
from adapterhub_local.progress import Quiet, Reporter
from adapterhub_local.registry import Version
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.packing import forward, is_exact, is_exact_row, pack_groups

ADAPTERS = 16  # in one row
EXAMPLES = 8  # of each of them

Factors = Mapping[str, Delta]


@dataclass(frozen=True)
class Ranked:
    """An adapter, or the base if it is None, with its mean loss in nats a token of the answers."""

    version: Version | None
    loss: float


def rank_by_loss(
    base: LoadedBase, versions: Sequence[Version], tests: Sequence[Example], reporter: Reporter | None = None
) -> list[Ranked]:
    """The base and the adapters by their loss on `tests`, the least first."""
    num_labels = sum(example.num_labels for example in tests)
    found = []
    with (reporter or Quiet()).counting("scoring adapters") as progress:
        found.append(Ranked(None, evaluate(base.model, tests, EXAMPLES).loss))
        factors = {version: _factors(version, base) for version in versions}
        together = [version for version in versions if factors[version] is not None]
        width = ADAPTERS if _can_share_rows(base, tests) else 1
        for start in range(0, len(together), width):
            part = together[start : start + width]
            losses = _losses(base, [factors[version] or {} for version in part], tests)
            found += [Ranked(version, loss / num_labels) for version, loss in zip(part, losses, strict=True)]
            progress(len(found), len(versions) + 1)
        for version in versions:
            if factors[version] is None:
                found.append(Ranked(version, score_folder(base, version.path, tests, EXAMPLES).loss))
                progress(len(found), len(versions) + 1)
    return sorted(found, key=lambda one: one.loss)


def _factors(version: Version, base: LoadedBase) -> Factors | None:
    """What is added to which module; None for what is not a sum of such additions below the output head."""
    try:
        adapter = open_adapter(version.path)
    except BadFile:
        return None
    head = base.model.get_output_embeddings()
    linear = {
        name: module
        for name, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if not adapter.shapes.keys() <= linear.keys():
        return None
    routed = [name.rpartition(".")[0] for name, module in base.model.named_modules() if isinstance(module, Experts)]
    if any(module.startswith(f"{block}.") for module in adapter.shapes for block in routed):
        return None  # layers there are given the tokens of all adapters in an order of their own
    dtype, device = base.model.dtype, base.model.device
    return {
        name: Delta(delta.A.to(device, dtype), delta.B.to(device, dtype), delta.scaling)
        for name, delta in adapter.deltas()
    }


def _can_share_rows(base: LoadedBase, tests: Sequence[Example]) -> bool:
    """Whether groups in one row give the model what each gives alone."""
    if not is_exact(base.model, tests):
        return False
    probes = [tests[0], tests[-1]]
    return is_exact_row(base.model, probes, pack_groups([[probe] for probe in probes]))


def _losses(base: LoadedBase, adapters: Sequence[Factors], tests: Sequence[Example]) -> list[float]:
    """The sum of the loss over all tokens of answers, of each adapter."""
    losses = [0.0] * len(adapters)
    step = EXAMPLES if is_exact(base.model, tests) else 1
    with torch.inference_mode():
        for start in range(0, len(tests), step):
            batch = tests[start : start + step]
            packed = pack_groups([batch] * len(adapters))
            length = packed.num_tokens // len(adapters)
            with _added(base.model, adapters, length):
                logits, targets, owner = forward(base.model, packed)
            loss = cross_entropy(logits.float(), targets, reduction="none")
            for number, part in zip((owner // len(batch)).tolist(), loss.tolist(), strict=True):
                losses[number] += part
    return losses


@contextmanager
def _added(model: Modules, adapters: Sequence[Factors], length: int) -> Iterator[None]:
    """For as long as the block, adapter i is added to the tokens from i * `length` on."""

    def hook(name: str) -> Any:
        def add(module: torch.nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            whole = output.clone()
            for place, factors in enumerate(adapters):
                if name in factors:
                    own, delta = slice(place * length, (place + 1) * length), factors[name]
                    whole[:, own] += delta.scaling * (given[0][:, own] @ delta.A.T) @ delta.B.T
            return whole

        return add

    modules = dict(model.named_modules())
    names = {name for factors in adapters for name in factors}
    hooks = [modules[name].register_forward_hook(hook(name)) for name in sorted(names)]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
