"""From a loaded base to an engine: check the architecture, wrap the linear layers, size the cache."""

import os
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.base.experts import has_experts
from adapterhub_local.base.load import LoadedBase
from adapterhub_local.base.model import BaseModel
from adapterhub_local.errors import InputError
from serve.adapters.leases import Leases
from serve.adapters.pool import AdapterPool
from serve.adapters.reader import AdapterReader
from serve.adapters.slots import Slots
from serve.adapters.stacked import StackedSlots
from serve.engine.cache import KVCache
from serve.engine.engine import Engine
from serve.engine.graphs import Graphs
from serve.engine.options import EngineOptions
from serve.engine.pages import PAGE, PagePool, pages_for
from serve.engine.request import Request, SamplingParams, Scheduled
from serve.engine.runner import Runner
from serve.engine.self_check import choose_fused, choose_lean, use_packed_attention
from serve.kernels.choose import Kernels, choose_kernels
from serve.lora.experts import follow_routes
from serve.lora.linear import LoraContext, shared_inputs, watch_embeddings, wrap_linears
from serve.lora.rows import Embeddings
from serve.lora.ways import use_fastest
from serve.lora.weights import own_weight, use_dense, use_four_bit_always

DEFAULT_MAX_LENGTH = 4096
SCORED_BYTES = 256_000_000  # logits in float32 of the prompts' tokens that one step scores
COPIED_BYTES = 256_000_000  # each of two copies of what is read on the CPU


def build_engine(base: LoadedBase, options: EngineOptions | None = None, leases: Leases | None = None) -> Engine:
    """An engine over `base`, whose model is changed in place; `leases` keep its adapters' files.

    Raises Incompatible if it cannot be served.
    """
    model = base.model
    device = model.get_input_embeddings().weight.device
    options = options or EngineOptions.on(device.type)
    max_length = _max_length(base, options.max_length)
    shared = shared_inputs(model)
    kernels = choose_kernels(options.kernels, device, model.dtype, _heads(model))
    checked = use_packed_attention(model, kernels)
    context = LoraContext(kernels=kernels)
    embeddings = Embeddings(model)
    layers = wrap_linears(model, context, shared)
    follow_routes(model, context, layers)
    watch_embeddings(model, context)
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    is_gpu = device.type == "cuda"
    fused = choose_fused(model, checked, base.cores) if _is_c(model, kernels, options) else None
    # kernels of C read adapters where they are kept, whatever else is used
    is_in_place = fused is not None or (kernels is not None and kernels.has("add_parts"))
    in_place = layers if is_in_place else None
    reader = AdapterReader(
        base.info, shapes, lambda name: own_weight(layers[name].base), model.dtype, is_gpu, in_place, embeddings
    )
    pool = AdapterPool(reader, max_bytes=options.adapter_bytes, max_pins=options.max_adapters - 1, leases=leases)
    slots = (
        Slots(layers, options.max_adapters, pool.records)
        if is_in_place
        else StackedSlots(layers, model.dtype, device, options.max_adapters, pool.records)
    )
    max_bytes = free_bytes(device) // 4 if options.base_bytes is None else options.base_bytes
    if is_gpu and options.base_exec == "auto":
        use_fastest(slots.groups, model.dtype, max_bytes, kernels)
    elif options.base_exec == "auto" and kernels is not None and kernels.has("multiply"):
        use_four_bit_always(slots.groups, kernels)
    elif options.base_exec != "auto" or fused is None:
        use_dense(slots.groups, model.dtype, options.base_exec, max_bytes)
    num_pages = _num_pages(options, max_length, checked.page_bytes, device)
    pages = PagePool(num_pages, base.info.fingerprint, options.prefix_bytes // checked.page_bytes)
    is_copied = device.type == "cpu" and not (kernels and kernels.has("paged_attention"))
    max_copied = min(num_pages, COPIED_BYTES // checked.page_bytes) if is_copied else 0
    cache, graphs = KVCache(num_pages, max_copied), None
    lean = choose_lean(model, checked, kernels) if kernels is not None and kernels.has("add_norm") else None
    # how many tokens an expert is given is not known before: a step with experts cannot be replayed
    if options.cuda_graphs and kernels is not None and is_gpu and not has_experts(model):
        assert isinstance(slots, StackedSlots), "adapters are in place on a CPU only"
        graphs = Graphs(model, cache, context, slots, kernels, max_length, lean=lean)
    if fused is not None:
        fused.cache = cache
    cores = base.cores if fused is None else fused.cores
    runner = Runner(model, cache, context, graphs, fused=fused, lean=lean, cores=cores)
    if is_gpu:
        _warm_up(runner)
        if graphs is not None:
            graphs.prepare(options.max_rows)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    max_scored = max(1, min(options.tokens_per_step, SCORED_BYTES // (4 * vocabulary)))
    return Engine(runner, slots, pool, options, pages, max_length, max_scored)


def _is_c(model: BaseModel, kernels: Kernels | None, options: EngineOptions) -> bool:
    """Whether steps may be computed in C: in bfloat16 those alone, for the other kernels of a CPU are in float32."""
    if model.device.type != "cpu" or options.kernels in ("torch", "triton"):
        return False
    if model.dtype == torch.bfloat16:
        return True
    return kernels is not None and all(map(kernels.has, ("add_parts", "paged_attention", "multiply")))


def _warm_up(runner: Runner) -> None:
    """Two steps without a request: the memory of the whole KV cache is taken now or never, and kernels are compiled."""
    request = Request("warm-up", (0,) * PAGE, SamplingParams(max_tokens=1), pages=[1])
    for start, count in ((0, PAGE - 1), (PAGE - 1, 1)):
        runner.forward([Scheduled(request, start, count)], {})
    torch.cuda.synchronize(runner.device)


def _heads(model: BaseModel) -> tuple[int, int, int]:
    """Heads, heads of keys and values, and the size of one."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_dim


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
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by what was loaded here
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: what all of it is must do
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _max_length(base: LoadedBase, wanted: int | None) -> int:
    config = base.model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if wanted is not None and limit is not None and wanted > limit:
        raise InputError(f"max_length is {wanted}, the context of base '{base.info.name}' is {limit} tokens")
    turning = _turning_point(config)
    if wanted is not None and turning is not None and wanted > turning:
        raise InputError(
            f"max_length is {wanted}, but base '{base.info.name}' (longrope) sees all positions of a batch in another "
            f"way once one request has more than {turning} tokens, which would change the others' answers"
        )
    return wanted or min(limit or DEFAULT_MAX_LENGTH, turning or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)


def _turning_point(config: Any) -> int | None:
    """The tokens beyond which rotary embeddings of kind longrope (Phi-3) change for the whole batch; None: never."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [each for each in parameters.values() if isinstance(each, dict)] or [parameters]
    return min(
        (each["original_max_position_embeddings"] for each in kinds if each.get("rope_type") == "longrope"),
        default=None,
    )
