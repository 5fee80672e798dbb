"""A decoder of Llama's kind as step.c reads it: where its weights lie, and which layers share an input."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adapterhub_local.base.attention import AttentionKind
from adapterhub_local.base.model import BaseModel
from adapterhub_local.errors import Incompatible
from serve.engine.llama import RmsNorm, head_norms, llama
from serve.engine.pages import PAGE
from serve.kernels.arena import Arena
from serve.kernels.cpu import BF16, FOUR_BIT, FP32, in_c
from serve.kernels.step import BLOCK, Group, Layer, Linear, Model, narrowest
from serve.lora.linear import LinearGroup, MultiLoraLinear
from serve.lora.weights import is_four_bit, plain_absmax

SMALL = 1 << 20  # bytes of a norm or a bias, and less than those of any weight that is much to read
KINDS = {torch.float32: FP32, torch.bfloat16: BF16}  # in which keys, values and adapters are held


@dataclass
class Decoder:
    """`structure` for C; `groups`: four a layer, in C's order; `widest`: inputs of the widest layer; `keep`: what the
    structure points to.

    The model's weights have moved to an arena, in the order in which a step reads them.
    """

    structure: Model
    groups: list[LinearGroup]
    widest: int
    keep: list[Any]


def read_decoder(model: BaseModel, kinds: Sequence[AttentionKind]) -> Decoder:
    """`model`, whose linear layers are wrapped; `kinds`: what each layer's attention does.

    Raises Incompatible, with the reason, if step.c would not compute the same.
    """
    model = llama(model)
    config = model.config
    if model.dtype not in KINDS:
        raise Incompatible("it computes in float32 and bfloat16 only")
    if not all(each.has_kernels for each in kinds):
        raise Incompatible("its attention is not the kernel's kind")
    keep: list[Any] = []
    arena = Arena()
    groups: list[LinearGroup] = []
    layers = (Layer * len(model.model.layers))()
    code = None
    for layer, attends, into in zip(model.model.layers, kinds, layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        found = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        into.qkv, into.out, into.gate_up, into.down = (_group(each, arena, keep) for each in found)
        groups += [each[0].group for each in found]
        into.norm_in = _norm(layer.input_layernorm, config, keep)
        into.norm_mlp = _norm(layer.post_attention_layernorm, config, keep)
        if norms := head_norms(attention):
            into.norm_query, into.norm_key = (_norm(each, config, keep) for each in norms)
        into.attention = in_c(attends)
        code = code if code is not None else _code(each for group in found for each in group)
    attention = model.model.layers[0].self_attn
    code = torch.zeros(16) if code is None else code
    keep += [layers, code]
    structure = Model(
        layers=layers, num_layers=len(layers), hidden=config.hidden_size, heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads, dim=attention.head_dim, mlp=config.intermediate_size,
        rotary=attention.head_dim, page=PAGE, kind=KINDS[model.dtype], code=code.data_ptr(),
        norm=_norm(model.model.norm, config, keep),
        head=_linear(model.get_output_embeddings().base, arena, keep), eps=config.rms_norm_eps,
    )  # fmt: skip
    if any(size % BLOCK for size in (structure.hidden, structure.mlp, structure.heads * structure.dim)):
        raise Incompatible(f"its layers' inputs are not multiples of {BLOCK}")
    _let_go(model, {each.data_ptr() for each in keep if isinstance(each, torch.Tensor)})
    return Decoder(structure, groups, max(group.in_features for group in groups), keep)


def _group(layers: Sequence[MultiLoraLinear], arena: Arena, keep: list[Any]) -> Group:
    group = layers[0].group
    if [id(each.base) for each in layers] != [id(base) for base in group.bases]:
        raise Incompatible("its layers are given other inputs than Llama's")
    linears = (Linear * 3)(*(_linear(each.base, arena, keep) for each in layers))
    return Group(linears, len(layers), group.in_features)


def _linear(layer: nn.Linear, arena: Arena, keep: list[Any]) -> Linear:
    """A layer's weight, moved; 16-bit numbers held as float32 are copied back to 16 bits: half to read."""
    bias = None if layer.bias is None else layer.bias.detach().float().contiguous()
    absmax = None
    if is_four_bit(layer.weight):
        state: Any = getattr(layer.weight, "quant_state")  # noqa: B009 (mypy knows of no such attribute)
        weight, kind = arena.moved(layer.weight.data), FOUR_BIT
        layer.weight.data = weight
        absmax = arena.moved(plain_absmax(state))
    elif layer.weight.dtype.is_floating_point:
        dtype, kind = narrowest(layer.weight.detach())
        weight = arena.moved(layer.weight.detach(), dtype)
        if weight.dtype == layer.weight.dtype:
            layer.weight.data = weight
    else:
        raise Incompatible("a weight is held in another way")
    keep += [weight, absmax, bias]
    addresses = [None if each is None else each.data_ptr() for each in (weight, absmax, bias)]
    return Linear(*addresses, kind, layer.out_features)


def _norm(norm: RmsNorm, config: Any, keep: list[Any]) -> int:
    """The address of a norm's weight."""
    if not type(norm).__name__.endswith("RMSNorm") or norm.variance_epsilon != config.rms_norm_eps:
        raise Incompatible(f"its norms are {type(norm).__name__}")
    weight = norm.weight.detach().float().contiguous()
    keep.append(weight)
    return weight.data_ptr()


def _code(layers: Any) -> torch.Tensor | None:
    """The 16 values of 4 bits, which are the same in all layers."""
    states = (getattr(each.base.weight, "quant_state", None) for each in layers)
    return next((state.code.float().clone() for state in states if state is not None), None)


def _let_go(model: BaseModel, moved: Container[int]) -> None:
    """Copy what is small and has not `moved`: the base's file is mapped whole, until the last tensor in it goes."""
    for parameter in model.parameters():
        if parameter.nbytes <= SMALL and parameter.data_ptr() not in moved:
            parameter.data = parameter.data.clone()
        state: Any = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            for name, value in list(vars(part).items()) if part is not None else ():
                if isinstance(value, torch.Tensor):
                    setattr(part, name, value.clone())
