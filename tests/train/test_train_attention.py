"""Attention over a packed row: every route computes what a dense mask over the whole row would, gradients included."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.varlen import varlen_attn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adapterhub_local.base.attention import AttentionKind
from adapterhub_local.rows import attention, packing, varlen
from adapterhub_local.rows.attention import attach, choose_route, detach, each_alone, is_attached
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.flash import attend_in_pieces
from adapterhub_local.rows.layout import Layout, pieces
from adapterhub_local.rows.packing import forward, is_exact, pack
from adapterhub_local.rows.varlen import packed_kernel, takes_shared_heads, torch_kernel
from adapterhub_local.train.checkpointing import enable_checkpointing
from tests.tiny import VOCABULARY

LAYOUTS = st.builds(
    Layout, st.integers(0, 20), st.lists(st.integers(1, 20), min_size=1, max_size=5).map(tuple)
)  # fmt: skip
WINDOWS = st.one_of(st.none(), st.integers(1, 40))
PLAIN = AttentionKind(1.0)
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def rows(layout: Layout, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Random query, key and value as a layer makes them: (1, heads, T, 8), the heads of a token side by side."""
    made = (torch.randn(1, layout.tokens, count, 8, dtype=dtype) for count in (heads, kv_heads, kv_heads))
    return [tensor.requires_grad_().transpose(1, 2) for tensor in made]


def seen(layout: Layout, window: int | None) -> torch.Tensor:
    """(T, T) bool by the definition: keys of the prefix and the same example, no later and within the window."""
    owner = torch.tensor([0] * layout.prefix + [at for at, n in enumerate(layout.rests, 1) for _ in range(n)])
    place = torch.tensor([*range(layout.prefix), *(layout.prefix + at for n in layout.rests for at in range(n))])
    order = torch.arange(layout.tokens)
    mask = (order[:, None] >= order) & ((owner[:, None] == owner) | (owner == 0))
    return mask if window is None else mask & (place[:, None] - place < window)


def dense(query, key, value, layout, window, scale, softcap=None) -> torch.Tensor:
    """The attention of the whole row behind a dense mask."""
    repeats = query.shape[1] // key.shape[1]
    scores = scale * query @ key.repeat_interleave(repeats, 1).transpose(-1, -2)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen(layout, window), -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(repeats, 1)).transpose(1, 2)


def reference_kernel(query, key, value, ends_q, ends_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch documents of `varlen_attn`, causal from the bottom right, one sequence at a time."""
    assert window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    outs = []
    for at in range(len(ends_q) - 1):
        q, k, v = (
            query[ends_q[at] : ends_q[at + 1]],
            key[ends_k[at] : ends_k[at + 1]],
            value[ends_k[at] : ends_k[at + 1]],
        )
        assert 0 < len(q) <= max_q
        assert len(q) <= len(k) <= max_k
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        one = Layout(0, (k.shape[2],))
        window = None if window_size[0] < 0 else window_size[0] + 1
        padded = torch.cat([q.new_zeros(1, q.shape[1], k.shape[2] - q.shape[2], q.shape[3]), q], dim=2)
        outs.append(dense(padded, k, v, one, window, scale)[0, k.shape[2] - q.shape[2] :])
    return torch.cat(outs)


def without_enable_gqa(takes_shared: bool, is_right: bool = True):
    """The kernel as torch 2.11 has it, which says nothing of shared heads: it computes them, refuses them, or errs."""
    calls: list[tuple[int, int]] = []

    def kernel(query, key, value, ends_q, ends_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        calls.append((query.shape[1], key.shape[1]))
        is_shared = query.shape[1] != key.shape[1]
        if is_shared and not takes_shared:
            raise RuntimeError("key and query must have the same number of heads")
        out = reference_kernel(
            query, key, value, ends_q, ends_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=True
        )
        return out if is_right or not is_shared else out.flip(1)

    return kernel, calls


@pytest.mark.parametrize(("takes_shared", "is_right"), [(True, True), (False, True), (True, False)])
def test_the_kernel_of_older_versions(takes_shared: bool, is_right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `enable_gqa`, shared heads go to the kernel if a trial was right, and are repeated if not."""
    layout = Layout(3, (4, 9))
    given = rows(layout, 4, 2)
    kernel, calls = without_enable_gqa(takes_shared, is_right)
    monkeypatch.setattr(varlen, "torch_kernel", lambda: kernel)
    wanted = dense(*given, layout, None, 0.3)
    toward = torch.randn_like(wanted)
    with torch.inference_mode():  # a trial in the middle of whatever goes on
        takes_shared_heads(kernel, given[0].device, given[0].dtype)
    tried = len(calls)
    for _ in range(2):
        out = packed_kernel(*given, layout, AttentionKind(0.3))
        assert torch.allclose(out, wanted, atol=1e-9)
        pairs = zip(
            torch.autograd.grad(out, given, toward),
            torch.autograd.grad(wanted, given, toward, retain_graph=True),
            strict=True,
        )
        assert all(torch.allclose(ours, theirs, atol=1e-9) for ours, theirs in pairs)
    assert calls[tried:] == [(4, 2 if takes_shared and is_right else 4)] * 2


@given(LAYOUTS, WINDOWS, st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]), st.sampled_from([None, 0.3]))
@settings(max_examples=60)
def test_every_route_is_dense_attention(layout, window, heads, scale) -> None:
    """For any prefix, examples, window and grouping of heads all routes give the result and gradients of a mask."""
    given = rows(layout, *heads)
    scale = scale or given[0].shape[-1] ** -0.5
    wanted = dense(*given, layout, window, scale)
    toward = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, given, toward)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "torch_kernel", lambda: reference_kernel)
        for route in (attend_in_pieces, each_alone, packed_kernel):
            out = route(*given, layout, AttentionKind(scale, window=window))

            assert torch.allclose(out, wanted, atol=1e-9)
            for ours, theirs in zip(torch.autograd.grad(out, given, toward), gradients, strict=True):
                assert torch.allclose(ours, theirs, atol=1e-9)


@given(LAYOUTS, WINDOWS, st.sampled_from([(4, 4), (4, 2)]))
@settings(max_examples=20)
def test_soft_caps(layout, window, heads) -> None:
    """Capped scores, which no kernel has, are those of a mask over the whole row."""
    given = rows(layout, *heads)
    wanted = dense(*given, layout, window, 0.7, 2.0)
    out = each_alone(*given, layout, AttentionKind(0.7, window=window, softcap=2.0))
    toward = torch.randn_like(wanted)

    assert torch.allclose(out, wanted, atol=1e-5)  # the softmax of eager attention is in float32
    pairs = zip(torch.autograd.grad(out, given, toward), torch.autograd.grad(wanted, given, toward), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in pairs)


@given(LAYOUTS, WINDOWS)
def test_pieces_cover_what_is_seen(layout: Layout, window: int | None) -> None:
    """The pieces are the pairs of the definition, each once, and no more of them than tokens x window."""
    own, earlier = pieces(layout, AttentionKind(1.0, window=window))
    spans = [
        *((span, span, None) for span in own),
        *((piece.queries, piece.keys, piece.kind.window) for piece in earlier),
    ]
    count = torch.zeros(layout.tokens, layout.tokens, dtype=torch.int64)
    for (first, last), (begin, stop), limit in spans:
        query, key = torch.arange(first, last)[:, None], torch.arange(begin, stop)
        if (first, last) == (begin, stop):
            count[first:last, begin:stop] += (key <= query).long()
        else:
            near = first - query <= 0 if limit is None else (query - first) + (stop - key) < limit
            assert near.expand(-1, stop - begin).any(1).all()  # a softmax over nothing is not a number
            count[first:last, begin:stop] += near.expand(-1, stop - begin).long()

    assert torch.equal(count, seen(layout, window).long())
    assert own[0][0] == 0
    assert [span[0] for span in own[1:]] == [span[1] for span in own[:-1]]
    if window is not None:
        area = sum((last - first) * (stop - begin) for (first, last), (begin, stop), _ in spans)
        assert area <= 2 * layout.tokens * window


def test_rows_of_16_bits() -> None:
    """In bfloat16 the pieces are as near to exact attention as one kernel over a mask is."""
    torch.manual_seed(0)
    layout = Layout(40, (30, 50, 20))
    given = [tensor.detach() for tensor in rows(layout, 4, 2)]
    exact = dense(*given, layout, None, 0.35)
    rounded = [tensor.bfloat16() for tensor in given]
    repeated = (rounded[0], *(tensor.repeat_interleave(2, 1) for tensor in rounded[1:]))
    masked = torch.nn.functional.scaled_dot_product_attention(*repeated, attn_mask=seen(layout, None), scale=0.35)
    ours = attend_in_pieces(*rounded, layout, AttentionKind(0.35))

    error, its_error = (ours.double() - exact).norm(), (masked.transpose(1, 2).double() - exact).norm()
    assert error < 1.2 * its_error


def test_the_choice_of_a_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernel on a CPU; torch's packed kernel on a new enough GPU in 16 bits; else each example alone."""
    layout = Layout(3, (4, 5))
    query, _, value = (tensor.detach() for tensor in rows(layout, 4, 2, torch.bfloat16))
    assert choose_route(query, value, PLAIN, 0.0) is attend_in_pieces
    assert choose_route(query, value, AttentionKind(1.0, softcap=50.0), 0.0) is each_alone
    assert choose_route(query, value, PLAIN, 0.1) is each_alone
    assert choose_route(query, value[..., :4], PLAIN, 0.0) is each_alone

    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])

    def on_gpu(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> object:
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            tensor = torch.empty(1, 4, 12, head_dim, dtype=dtype, device="cuda")
        return choose_route(tensor, tensor, PLAIN, 0.0)

    assert on_gpu() is packed_kernel
    with monkeypatch.context() as patch:
        patch.setattr(varlen, "torch_kernel", lambda: without_enable_gqa(takes_shared=False)[0])  # torch 2.11's
        assert on_gpu() is packed_kernel
    assert on_gpu(torch.float32) is each_alone
    assert on_gpu(head_dim=260) is each_alone
    assert on_gpu(head_dim=20) is each_alone
    capability[0] = (7, 5)
    assert on_gpu() is each_alone
    capability[0] = (9, 0)
    monkeypatch.setattr(varlen, "torch_kernel", lambda: None)  # a torch that has none
    assert on_gpu() is each_alone
    monkeypatch.setattr(varlen, "torch_kernel", lambda: lambda query, key, value, window_size: None)  # or an older one
    assert on_gpu() is each_alone


@pytest.mark.parametrize("window", [None, 6])
def test_torch_takes_the_arguments_of_the_packed_kernel(window: int | None) -> None:
    """torch's own `varlen_attn` accepts what we pass, gradients included, as far as shapes tell without a GPU."""
    layout = Layout(3, (4, 9))
    given = [tensor.detach().to("meta").requires_grad_() for tensor in rows(layout, 4, 2, torch.bfloat16)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", lambda *args, device, **kwargs: torch.empty(4, dtype=torch.int32, device=device))
        patch.setattr(varlen, "takes_shared_heads", lambda *_: False)  # which a torch without `enable_gqa` is asked for
        out = packed_kernel(*given, layout, AttentionKind(0.3, window=window))
    gradients = torch.autograd.grad(out, given, torch.empty_like(out))

    assert torch_kernel() is varlen_attn
    assert out.shape == (1, layout.tokens, 4, 8)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in given]


# -- in models -----------------------------------------------------------------------------------------


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, **changes}
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def examples_of(*lengths: int) -> list[Example]:
    return [
        Example((5, 6, 7, 8, 9, *range(10 + at, 10 + at + length)), ((length - 2, 5 + length),))
        for at, length in enumerate(lengths)
    ]


def test_rounding_is_not_taken_for_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a deep model's logits move by more than 2 % where attention is rounded otherwise: it is still packed.

    So on a GPU, whose kernels sum in another order for every shape. What sees its neighbours is found all the same.
    """
    model, examples = llama(num_hidden_layers=24).bfloat16(), examples_of(8, 9, 10)
    draws = torch.Generator().manual_seed(0)

    def rounded_otherwise(*args):
        out = attend_in_pieces(*args)
        return out * (1 + 4 * torch.finfo(out.dtype).eps * torch.randn(out.shape, generator=draws).to(out))

    def leaking(query, key, value, layout, kind):
        return attend_in_pieces(query, key, value, Layout(0, (layout.tokens,)), kind)

    monkeypatch.setattr(attention, "attend_in_pieces", rounded_otherwise)
    monkeypatch.setattr(packing, "SAME_ROUNDED", 1e-3)
    assert is_exact(model, examples)
    assert is_attached(model)
    monkeypatch.setattr(attention, "attend_in_pieces", leaking)
    assert is_exact(model, examples)  # by masks
    assert not is_attached(model)


@pytest.mark.parametrize("used", ["sdpa", "eager"])
def test_a_model_keeps_its_own_attention_for_everything_else(used: str) -> None:
    """Attached, a model has its logits and writes its tokens as before; detached, it is as it was."""
    model, ids = llama(), torch.arange(20)[None]
    model.set_attn_implementation(used)
    before, written = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    padding = torch.cat([torch.zeros(1, 4), torch.ones(1, 16)], 1).long()
    padded = model(ids, attention_mask=padding).logits

    assert is_exact(model, examples_of(8, 9, 10))
    assert is_attached(model)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids, attention_mask=padding).logits, padded)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), written)
    detach(model)
    assert model.config._attn_implementation == used
    assert torch.equal(model(ids).logits, before)


def test_checkpoints_are_computed_again_with_the_layout() -> None:
    """A block that is computed again in the backward pass attends as it did: the gradients are the same."""
    gradients = []
    for is_checkpointed in (False, True):
        model = llama().train()
        assert attach(model)
        enable_checkpointing(model, is_checkpointed)
        logits, _, _ = forward(model, pack(examples_of(8, 30, 12)))
        logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])

    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_attention_we_do_not_have_is_left_to_the_model() -> None:
    """An attention with something of its own (sinks) falls back to masks; GPT-2's is plain and does not."""
    strange = llama()
    for layer in strange.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs, s_aux=torch.ones(4))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64)).eval()

    assert is_exact(strange, examples_of(8, 9))
    assert not is_attached(strange)
    assert is_exact(gpt2, examples_of(8, 9))
    assert is_attached(gpt2)


def test_dropout_of_attention_is_kept() -> None:
    """A model that drops attention weights in training still does so in packed rows."""
    model = llama(attention_dropout=0.5)
    packed = pack(examples_of(8, 9))
    assert attach(model)
    once, again = forward(model, packed)[0], forward(model, packed)[0]
    model.train()

    assert torch.equal(once, again)
    assert not torch.allclose(forward(model, packed)[0], once, atol=1e-3)


def test_memory_is_the_sum_over_examples() -> None:
    """What autograd keeps of a row of twice as many examples is twice as much: nothing of tokens x tokens."""
    kept = []
    for count in (4, 8):
        layout = Layout(0, (50,) * count)
        given = rows(layout, 4, 2, torch.float32)
        sizes: dict[int, int] = {}

        def save(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            attend_in_pieces(*given, layout, AttentionKind(0.3))
        kept.append(sum(sizes.values()))

    assert kept[1] == 2 * kept[0]
    assert kept[0] == 200 * (4 * 8 * (4 + 4) + 2 * 2 * 8 * 4 + 4 * 4)
    assert math.isclose(kept[0] / 200, 400)
