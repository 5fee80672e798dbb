"""What the forward pass keeps for the backward pass, counted operation by operation; tests hold it to autograd.

The base is frozen, so its products keep nothing but what their own input's gradient needs; what is kept is what
norms, attention and the gate multiply with, and the inputs of A and B of every adapted module.
"""

from dataclasses import dataclass

from adapterhub_local.errors import InputError
from adapterhub_local.plan.shape import Linear, Shape
from adapterhub_local.rows import bounds


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: a row of `tokens`, `labels` of which are predicted.

    is_packed: several examples share the row, `longest` tokens at most each (None: not known). compute, factor:
    bytes of an element of activations and of A and B. is_checkpointed: only the input of each block is kept, the
    rest is computed again; is_offloaded: and kept in the host's memory, and MLPs computed in parts of MLP_TOKENS.
    drawn: tokens whose keys and values the engine holds that draws answers.
    trained_tokens: how many have rows of the embeddings that are trained too.
    shards: processes that divide the weights of the base in 4 bits between them.
    """

    tokens: int
    labels: int
    is_packed: bool
    compute: int
    factor: int
    rank: int
    targets: tuple[str, ...]
    has_dropout: bool = False
    is_checkpointed: bool = False
    is_offloaded: bool = False
    longest: int | None = None
    drawn: int = 0
    trained_tokens: int = 0
    shards: int = 1

    @property
    def mlp_tokens(self) -> int:
        """Tokens that an MLP takes at once."""
        return min(self.tokens, bounds.MLP_TOKENS) if self.is_offloaded else self.tokens


def kept(shape: Shape, run: Pass) -> int:
    """Bytes alive at the end of the forward pass, logits not included."""
    rotary = 2 * shape.head_dim * run.compute * run.tokens
    if not run.is_checkpointed:
        return shape.layers * block(shape, run) + rotary - _first(shape, run)
    return (1 if run.is_offloaded else shape.layers) * boundary(shape, run) + rotary


def _first(shape: Shape, run: Pass) -> int:
    """What the first block does not keep: gradients end at its attention's input, so dropout there keeps no mask."""
    if not run.has_dropout:
        return 0
    readers = [linear for linear in adapted(shape, run.targets) if linear.reads == "attention"]
    return sum(linear.in_features for linear in readers) * run.factor * run.tokens


def boundary(shape: Shape, run: Pass) -> int:
    """Bytes of what one block hands to the next: all that a checkpointed block keeps."""
    return shape.hidden * run.compute * run.tokens


def block(shape: Shape, run: Pass) -> int:
    """Bytes one decoder block keeps; of an MLP that is computed in parts its input, and the rest of one part."""
    wide = ("inner", "shared inner", "experts", "mlp") if shape.experts else ("inner",)
    narrow = tuple({linear.reads for linear in shape.linears} - {*wide})
    per_token = _norms(shape, run) + _attention(shape, run) + _factors(shape, run, narrow)
    inside = mlp(shape, run) + _factors(shape, run, wide)
    if shape.experts and run.is_offloaded:
        per_token += shape.hidden * run.compute  # what the router reads and nothing else keeps; experts have copies
    return per_token * run.tokens + inside * run.mlp_tokens + _square(shape, run)


def adapted(shape: Shape, targets: tuple[str, ...]) -> tuple[Linear, ...]:
    """The linear layers of a block that have an adapter. Raises InputError for a target that is none of them."""
    chosen = set()
    for target in targets:
        found = {linear for linear in shape.linears if target in ("all-linear", linear.group, linear.name)}
        # as PEFT reads it, a target may be any end of a module's name
        found |= {linear for linear in shape.linears if target.endswith("." + linear.name)}
        if not found:
            names = ", ".join(linear.name for linear in shape.linears)
            raise InputError(
                f"adapter.target_modules: '{target}' is not a linear layer of {shape.model_type}: it has {names}"
            )
        chosen |= found
    return tuple(linear for linear in shape.linears if linear in chosen)


def _norms(shape: Shape, run: Pass) -> int:
    """Inputs of the norms, a token. RMS norms compute in float32: a 16-bit input is copied."""
    width = run.compute if shape.is_layer_norm else 4
    # two layer norms of one input keep it once, as do blocks whose attention and MLP run side by side
    inputs = 1 if shape.is_layer_norm else shape.norms
    heads = (shape.heads + shape.kv_heads) * (shape.head_dim * 4 + 4) if shape.has_head_norms else 0
    if shape.has_wide_norms:
        heads = (shape.heads + shape.kv_heads) * shape.head_dim * 4 + 2 * 4
    return inputs * shape.hidden * width + shape.norms * 4 + heads


def _attention(shape: Shape, run: Pass) -> int:
    """Queries, keys, values and result, a token; with a mask, keys and values are repeated for every query head."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    result = queries * run.compute
    is_eager = shape.scores == "eager"
    is_repeated = not run.is_packed if is_eager else _has_mask(shape, run)
    if shape.scores == "math" or (is_eager and run.is_packed):
        together = 2 * keys
    elif is_repeated and shape.kv_heads < shape.heads:
        together = 2 * queries
    else:
        # a fused projection is kept whole by the values cut out of it
        together = keys + (queries + 2 * keys if shape.is_fused or shape.is_layer_norm else keys)
    sums = 4 * shape.heads if shape.scores == "none" else 0
    width = 4 if shape.scores == "math" else run.compute  # torch computes that in float32
    return (queries + together) * width + result + sums


def _square(shape: Shape, run: Pass) -> int:
    """What grows with the pairs of tokens: the mask as attention code adds it, and scores where attention is eager."""
    if shape.scores == "eager":  # softmax in float32, and what it is cast or capped from
        keys = run.longest if run.is_packed and run.longest is not None else run.tokens
        return shape.heads * run.tokens * min(run.tokens, keys) * 8
    pairs = run.tokens * run.tokens
    if shape.scores == "math":
        return shape.heads * pairs * 4
    return pairs * run.compute if _has_mask(shape, run) else 0


def _has_mask(shape: Shape, run: Pass) -> bool:
    """Whether attention takes a mask: in Falcon always, else for one example that is longer than the window.

    Examples in one row attend each to itself (rows/attention.py).
    """
    return shape.makes_mask or (not run.is_packed and shape.window is not None and run.tokens > shape.window)


def mlp(shape: Shape, run: Pass) -> int:
    """Gate, activated gate and up, a token; without a gate, what the activation is applied to."""
    return shape.intermediate * run.compute * (3 if shape.is_gated else 1) + _routing(shape, run)


def _routing(shape: Shape, run: Pass) -> int:
    """What the router keeps, a token, and what the experts give before it is weighted."""
    if not shape.experts:
        return 0
    # probabilities in float32; the chosen ones with their numbers; places, and places back
    router = 4 * shape.experts + shape.active * (8 + 4 + 3 * 8)
    is_shared = any(linear.reads == "shared inner" for linear in shape.linears)  # what that one gives is weighted, too
    return router + (shape.active + is_shared) * shape.hidden * run.compute


def _factors(shape: Shape, run: Pass, reads: tuple[str, ...]) -> int:
    """What A and B are applied to, a token: their modules' inputs, each once for all of `reads` that read it.

    With dropout PEFT's layers compute (train/fused_lora.py does not), and keep an input in the dtype of A and its mask.
    """
    modules = [linear for linear in adapted(shape, run.targets) if linear.reads in reads]
    if run.has_dropout:
        return sum(linear.active * (2 * linear.in_features + run.rank) * run.factor for linear in modules)
    inputs = {linear.reads: linear.active * linear.in_features for linear in modules}
    if run.is_packed or not shape.copies_result:  # attention keeps it
        inputs.pop("heads", None)
    return (sum(inputs.values()) + sum(linear.active for linear in modules) * run.rank) * run.compute
