"""From a loaded base to an engine: check the architecture, wrap the linear layers, size the cache."""

import os
from pathlib import Path

import torch

from adapterhub_local.base.load import LoadedBase
from adapterhub_local.errors import InputError
from serve.engine.cache import KVCache
from serve.engine.check import use_packed_attention
from serve.engine.engine import Engine
from serve.engine.options import EngineOptions
from serve.engine.pages import PAGE, PagePool, pages_for
from serve.engine.pool import AdapterPool
from serve.engine.runner import Runner
from serve.lora.linear import LoraContext, shared_inputs, wrap_linears
from serve.lora.slots import Slots
from serve.lora.weights import own_weight, use_dense

DEFAULT_MAX_LENGTH = 4096


def build_engine(base: LoadedBase, options: EngineOptions | None = None) -> Engine:
    """An engine over `base`, whose model is changed in place. Raises Incompatible if it cannot be served."""
    options = options or EngineOptions()
    model = base.model
    max_length = _max_length(base, options.max_length)
    shared = shared_inputs(model)
    page_bytes = use_packed_attention(model)
    context = LoraContext()
    layers = wrap_linears(model, context, shared)
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    device = model.get_input_embeddings().weight.device
    pool = AdapterPool(
        base.info,
        shapes,
        lambda name: own_weight(layers[name].base),
        dtype=model.dtype,
        max_bytes=options.adapter_bytes,
    )
    slots = Slots(layers, model.dtype, device, options.max_adapters)
    max_bytes = free_bytes(device) // 4 if options.base_bytes is None else options.base_bytes
    use_dense(slots.groups, model.dtype, options.base_exec, max_bytes)
    num_pages = _num_pages(options, max_length, page_bytes, device)
    pages = PagePool(num_pages, base.info.fingerprint, options.prefix_bytes // page_bytes)
    runner = Runner(model, KVCache(num_pages), context)
    return Engine(runner, slots, pool, options, pages, max_length)


def _num_pages(options: EngineOptions, max_length: int, page_bytes: int, device: torch.device) -> int:
    """Pages of the KV cache: as many as were allowed, at most what all rows can use."""
    limit = free_bytes(device) // 2 if options.kv_bytes is None else options.kv_bytes
    if limit < page_bytes:
        raise InputError(f"{limit} bytes are too few for a KV cache: {PAGE} tokens take {page_bytes}")
    idle = options.prefix_bytes // page_bytes
    return min(options.max_rows * pages_for(max_length) + idle, limit // page_bytes)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device`; on the CPU what may be had without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: what all of it is must do
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _max_length(base: LoadedBase, wanted: int | None) -> int:
    limit = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if wanted is not None and limit is not None and wanted > limit:
        raise InputError(f"max_length is {wanted}, the context of base '{base.info.name}' is {limit} tokens")
    return wanted or min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
