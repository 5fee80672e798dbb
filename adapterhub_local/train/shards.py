"""A base in parts, one in each process: a block's 4-bit codes are brought together while it computes, and let go again.

FSDP2 does so (`torch.distributed.fsdp.fully_shard`), over the bytes as they are. Unlike FSDP1 (bitsandbytes#970) it
needs no view of them as floats, and without one nothing takes them for numbers: no cast to the dtype of activations,
and not PEFT, which gives factors the dtype of the weight that they are put on where that is a float. Embeddings, norms,
the head, the constants of codes and the factors are whole in every process.

To bring a block together takes all processes, so all make the same passes. Where one works alone, as when the result is
evaluated, it leads: the others give it the blocks that it names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from adapterhub_local.base.held import is_quantised
from adapterhub_local.base.model import AdaptedModel, Modules
from adapterhub_local.errors import QhubError

DONE = -1  # in place of a block's number: there is nothing more to give
SHARDS = "_qhub_shards"  # of a model: its blocks, if this process holds a part of them


class Shards:
    """The blocks of a model of which each process holds a part."""

    def __init__(self, blocks: list[Any], device: torch.device) -> None:
        self._blocks, self._device = blocks, device
        self._leads = False
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._announce, number), prepend=True)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """While the block lasts this process computes alone, and the others `give`; afterwards all are parted."""
        self._leads = True
        try:
            yield
        finally:
            self._leads = False
            self._broadcast(DONE)
            distributed.destroy_process_group()

    def give(self) -> None:
        """Give the process that leads the blocks that it names, until it is done."""
        while (number := self._broadcast(DONE)) != DONE:
            self._blocks[number].unshard()
            self._blocks[number].reshard()
        distributed.destroy_process_group()

    def _announce(self, number: int, *_: Any) -> None:
        if self._leads:
            self._broadcast(number)
            self._blocks[number].unshard()

    def _broadcast(self, number: int) -> int:
        """What the first process says, in all of them."""
        named = torch.tensor(number, device=self._device)
        distributed.broadcast(named, 0)
        return int(named)


def divide(model: AdaptedModel, device: str) -> None:
    """Keep of each block of the base this process's part. To be called in all processes, which have met.

    model: PEFT over a causal model in host memory; it is on `device` (`cpu` or `cuda`) afterwards. Raises QhubError
    if the bytes of a weight, brought together again, are not those that were loaded.
    """
    from torch.distributed.fsdp import fully_shard

    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    body = model.get_base_model().base_model
    blocks: list[Any] = blocks_of(body)
    packed = [_packed(block) for block in blocks]
    for block, layers in zip(blocks, packed, strict=True):
        for layer, (weight, state) in layers.items():
            layer.weight = nn.Parameter(weight.data, requires_grad=False)  # without the class and state that FSDP drops
            state.to(place)
        own = {layer.weight for layer in layers}
        fully_shard(
            block, mesh=mesh, reshard_after_forward=True,
            ignored_params={parameter for parameter in block.parameters() if parameter not in own},
        )  # fmt: skip
    fully_shard(body, mesh=mesh, ignored_params=set(body.parameters()))  # so that a pass begins and ends with it
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, distributed.tensor.DTensor):
                parameter.data = parameter.data.to(place)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(place)
    _check(body, blocks, packed, place)
    setattr(model, SHARDS, Shards(blocks, place))


def shards_of(model: Modules) -> Shards | None:
    """The divided blocks of a model; None if this process holds it whole."""
    found: Shards | None = getattr(model, SHARDS, None)
    return found


def blocks_of(body: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the members of its outermost lists that have weights in 4 bits."""
    found: list[nn.Module] = []
    for child in body.children():
        if isinstance(child, nn.ModuleList):
            found.extend(block for block in child if _packed(block))
        else:
            found.extend(blocks_of(child))
    return found


def _packed(block: nn.Module) -> dict[Any, tuple[torch.Tensor, Any]]:
    """The layers of a block that are held in 4 bits: the bytes of each, and what makes numbers of them."""
    found = {}
    for layer in block.modules():
        weight = layer._parameters.get("weight")
        if weight is not None and is_quantised(weight):
            found[layer] = (weight.data, weight.quant_state)  # type: ignore[attr-defined]
    return found


def _check(body: nn.Module, blocks: list[Any], packed: list[dict[Any, tuple[torch.Tensor, Any]]], place: Any) -> None:
    """Bring every block together once, compare it with what was loaded, and give its weights their states.

    FSDP makes the tensors that hold whole weights in the first pass, and fills the same ones in every later.
    """

    def compare(number: int, block: Any, *_: Any) -> None:
        for layer, (loaded, state) in packed[number].items():
            if not torch.equal(layer.weight.data.cpu(), loaded):
                raise QhubError(
                    f"the weights of block {number} are others once its parts are together: leave out --shard-base, "
                    "and please report it"
                )
            layer.weight.quant_state = state

    hooks = [block.register_forward_pre_hook(partial(compare, number)) for number, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            body(input_ids=torch.zeros(1, 1, dtype=torch.long, device=place), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
