"""The bytes of a training run by what they are for: base, adapter, gradients, optimizer, activations, logits.

The peak is just after a forward pass, when all that is kept for the backward pass is alive. Formulas follow what
`train/trainer.py` allocates; the constants of the CPU were fitted to the resident size of real runs
(benchmarks/plan.py). What a GPU takes is the same arithmetic: the two cases that ran on one took 7 and 8 % less
(benchmarks/RESULTS.md).
"""

from dataclasses import asdict, dataclass, replace

from adapterhub_local.plan.activations import Pass, adapted, block, boundary, kept, mlp
from adapterhub_local.plan.shape import Linear, Shape
from adapterhub_local.rows.bounds import HEAP_CHUNK, LOGITS_BYTES

MB = 10**6
WHOLE_BLOCKS = 3  # of a base in parts: the one that computes, the next one, and what arrives of it (train/shards.py)
STATES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "paged_adamw_32bit": 8}  # bytes a parameter

# resident before the base is loaded: torch, transformers, PEFT, bitsandbytes and the tokenizer; and 20 MB of code that
# only a step reads
CPU_LIBRARIES = 515 * MB
# glibc (2.36) cannot give an aligned chunk that was freed to a request of the same size, so that what a step takes from
# the heap leaves holes: this share of the weights, which each pass dequantises, and of the activations. That is for
# chunks smaller than HEAP_CHUNK; larger ones have pages of their own, which go back at once (train/heap.py). Runs of
# one recipe differ by an eighth either way; it is taken on the high side
HEAP_LOSS = 0.36
GPU_CONTEXT = 600 * MB  # CUDA context, workspaces of cuBLAS and bitsandbytes
GPU_ROUNDING = 0.1  # share of what comes and goes in a step that is lost between the allocator's blocks


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by purpose; `total` is what the device must have.

    workspace: dequantised weights, gradients of activations, and what the allocator loses. paged: the part of
    the optimizer's states that can move to the host. host: what was moved to the host's memory, which is in no
    other part. drawing: keys and values of drawn answers, and constants of the base as the engine reads them.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    libraries: int
    paged: int
    host: int = 0
    drawing: int = 0

    @property
    def total(self) -> int:
        parts: dict[str, int] = asdict(self)
        return sum(parts.values()) - self.paged - self.host

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def base_bytes(shape: Shape, compute: int, shards: int = 1) -> int:
    """A loaded base: linear layers in 4 bits, everything else in the dtype of activations.

    Where `shards` processes divide it, what one of them has: its part of the codes, WHOLE_BLOCKS, and all of the rest,
    constants included.
    """
    others = shape.num_parameters - shape.linear_size
    codes, constants = shape.linear_size / 2, shape.linear_size * (shape.quantisation.bits - 4) / 8
    if shards > 1:
        codes = min(codes, codes / shards + WHOLE_BLOCKS * codes / shape.layers)
    return round(codes + constants) + others * compute


def mapped_bytes(shape: Shape, compute: int) -> int:
    """On the CPU: pages of the base's file that stay resident beside the float32 copy of what is not quantised."""
    return (shape.num_parameters - shape.linear_size) * 2 if compute == 4 else 0


def num_factors(shape: Shape, rank: int, targets: tuple[str, ...]) -> int:
    """Parameters of A and B in all adapted modules."""
    a_rank = sum(linear.copies * (linear.in_features + linear.out_features) for linear in adapted(shape, targets))
    return shape.layers * rank * a_rank


def estimate(shape: Shape, run: Pass, optimizer: str, device: str) -> Memory:
    """The memory of training on rows such as `run`; device: `cpu` or `cuda`."""
    factors = num_factors(shape, run.rank, run.targets)
    logits = min(run.labels * shape.vocabulary * 4, LOGITS_BYTES)
    activations = kept(shape, run)
    if run.is_checkpointed:  # one block at a time is computed again
        activations += block(shape, replace(run, is_checkpointed=False))
    rows = run.trained_tokens * shape.hidden  # of embeddings, in float32 whatever the factors are in
    states = STATES[optimizer] * (factors + rows)
    parts = {
        "base": base_bytes(shape, run.compute, run.shards),
        # and its factors in the dtype of activations, while a step lasts
        "adapter": factors * (run.factor + (run.compute if run.compute != run.factor else 0)) + rows * 4,
        "gradients": factors * run.factor + rows * 4,
        "optimizer": states,
        "activations": activations,
        "logits": 3 * logits,  # log-softmax, its gradient, and that of the logits, in float32
        "drawing": _drawing(shape, run),
    }
    if device == "cpu":
        parts["base"] += mapped_bytes(shape, run.compute)
        workspace = _heap(shape, run) + _moment(shape, run)
        return Memory(**parts, workspace=workspace, libraries=CPU_LIBRARIES, paged=0)
    if not run.is_checkpointed and run.shards == 1:
        parts["base"] += round(shape.linear_size * shape.quantisation.unnested_bits / 8)
    largest = max(shape.linears, key=lambda linear: linear.size)
    workspace = _moment(shape, run) + _dequantised(largest, run)
    workspace += round(GPU_ROUNDING * (activations + parts["logits"] + workspace))
    paged = states if optimizer.startswith("paged") else 0
    host = 0
    if run.is_offloaded:
        host = shape.layers * boundary(shape, run)
        table = 0 if shape.is_tied else shape.vocabulary * shape.hidden * run.compute
        parts["base"], host = parts["base"] - table, host + table
    return Memory(**parts, workspace=workspace, libraries=GPU_CONTEXT, paged=paged, host=host)


def _drawing(shape: Shape, run: Pass) -> int:
    """What the engine that draws answers holds beside the base and the factors, of which it has a copy."""
    if not run.drawn:
        return 0
    pages = 2 * shape.layers * shape.kv_heads * shape.head_dim * run.compute * run.drawn
    constants = round(shape.linear_size * shape.quantisation.unnested_bits / 8)
    return pages + constants + num_factors(shape, run.rank, run.targets) * run.compute


def _dequantised(linear: Linear, run: Pass) -> int:
    """A weight as the backward pass dequantises it; PEFT's layer, which dropout needs, by way of 16 bits."""
    return linear.size * (run.compute + (2 if run.has_dropout and run.compute == 4 else 0))


def _heap(shape: Shape, run: Pass) -> int:
    """What glibc's heap loses in a step on the CPU, and the largest weight that is mapped instead."""
    small = [linear for linear in shape.linears if linear.size * run.compute < HEAP_CHUNK]
    large = [linear for linear in shape.linears if linear not in small]
    passes = 2 if run.is_checkpointed else 1  # forward; the backward pass is the last
    weights = shape.layers * sum(
        linear.copies * (passes * linear.size * run.compute + _dequantised(linear, run)) for linear in small
    )
    lost = round(HEAP_LOSS * (weights + _kept_in_heap(shape, run)))
    return lost + max((_dequantised(linear, run) for linear in large), default=0)


def _kept_in_heap(shape: Shape, run: Pass) -> int:
    """Bytes kept in chunks below HEAP_CHUNK; what longer rows have more is not in the heap, and loses nothing.

    Of a checkpointed run as if everything were kept: what is computed again leaves its holes in turn.
    """
    narrow, wide = (
        min(run.tokens, HEAP_CHUNK // (width * run.compute)) for width in (shape.hidden, shape.intermediate)
    )
    everything = kept(shape, replace(run, tokens=narrow, is_checkpointed=False))
    return everything - shape.layers * mlp(shape, run) * (narrow - wide)


def _moment(shape: Shape, run: Pass) -> int:
    """What the backward pass of one block holds for a moment: gradients of the gate's inputs and of the residual."""
    inner = shape.intermediate * (3 if shape.is_gated else 2) * run.mlp_tokens
    heads = shape.heads * shape.head_dim * 4 * run.tokens
    # parts of an MLP are put together in a tensor of their own
    residual = shape.hidden * (2 if run.mlp_tokens == run.tokens else 3) * run.tokens
    residual += 2 * shape.active * shape.hidden * run.mlp_tokens  # what experts are given and give
    return run.compute * (max(inner, heads) + residual)
