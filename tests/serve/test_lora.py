"""The multi-adapter layer and its slots: every token gets its own adapter's delta and no other."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from serve.lora.linear import LoraContext, MultiLoraLinear, unwrap_linears, wrap_linears
from serve.lora.product import Segment, lora_batch
from serve.lora.slots import Slots

IN, OUT = 24, 16
CPU = torch.device("cpu")


def factors(seed: int, rank: int, modules: tuple[str, ...] = ("",)) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, IN, generator=generator), torch.randn(rank, OUT, generator=generator))
        for name in modules
    }


def layer_and_slots() -> tuple[MultiLoraLinear, Slots]:
    torch.manual_seed(0)
    layer = MultiLoraLinear(nn.Linear(IN, OUT), LoraContext())
    return layer, Slots({"": layer}, torch.float32, CPU)


@pytest.mark.parametrize("max_masked", [0, 1000], ids=["segments", "mask"])
@pytest.mark.parametrize("counts", [(5,), (1, 1, 1), (4, 1, 7), (3, 0, 2)])
@torch.inference_mode()
def test_each_token_gets_its_delta(counts: tuple[int, ...], max_masked: int) -> None:
    """Mixed ranks, any number of tokens each, tokens without an adapter last: W x + B A x of each token's own."""
    layer, slots = layer_and_slots()
    ranks = (4, 1, 9)
    held = {str(index): factors(index, rank) for index, rank in enumerate(ranks)}
    segments, end = [], 0
    for index, count in enumerate(counts):
        slot = slots.put(str(index), held[str(index)], keep=held.keys())
        if count:
            segments.append(Segment(end, end + count, slot))
        end += count
    x = torch.randn(1, end + 3, IN)
    expected = layer.base(x)
    for segment, index in zip(segments, [i for i, count in enumerate(counts) if count], strict=True):
        a, b = held[str(index)][""]
        expected[0, segment.start : segment.end] += x[0, segment.start : segment.end] @ a.T @ b
    layer.context.tokens = lora_batch(segments, CPU, max_masked)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-5)


@torch.inference_mode()
def test_no_adapter_is_the_base() -> None:
    """Without an adapter in the batch, or for a layer no adapter has, the result is the base's, bit for bit."""
    layer, slots = layer_and_slots()
    x = torch.randn(2, 3, IN)
    assert torch.equal(layer(x), layer.base(x))
    slots.put("a", factors(1, 4), keep=set())
    assert torch.equal(layer(x), layer.base(x))
    assert lora_batch([], CPU, 64) is None


@torch.inference_mode()
def test_overflow_stays_with_its_adapter() -> None:
    """An adapter whose product overflows does not reach its neighbours in the batch."""
    layer, slots = layer_and_slots()
    wild = {"": (torch.full((2, IN), 3e38), torch.full((2, OUT), 3e38))}
    tame = factors(1, 4)
    keep = {"wild", "tame"}
    segments = [Segment(0, 1, slots.put("wild", wild, keep)), Segment(1, 2, slots.put("tame", tame, keep))]
    layer.context.tokens = lora_batch(segments, CPU, 64)
    x = torch.rand(1, 3, IN) + 1
    out = layer(x)[0]
    a, b = tame[""]
    torch.testing.assert_close(out[1], layer.base(x)[0, 1] + x[0, 1] @ a.T @ b, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out[2], layer.base(x)[0, 2])
    assert not torch.isfinite(out[0]).all()


@settings(deadline=None)
@given(
    uses=st.lists(
        st.tuples(st.sets(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from(["q", "v", "qv"])), max_size=25
    )
)
@torch.inference_mode()
def test_slots_never_mix(uses) -> None:
    """Whatever is put and replaced, adapters in use have ranges of their own that hold exactly their factors."""
    context = LoraContext()
    layers = {name: MultiLoraLinear(nn.Linear(IN, OUT), context) for name in "qv"}
    slots = Slots(layers, torch.float32, CPU)
    modules_of: dict[str, str] = {}
    for wanted, modules in uses:
        keep = {str(number) for number in wanted}
        held = {}
        for digest in sorted(keep):
            own = factors(int(digest), 1 + int(digest), tuple(modules_of.setdefault(digest, modules)))
            held[digest] = (slots.get(digest) or slots.put(digest, own, keep), own)
        ranges = sorted((slot.start, slot.end) for slot, _ in held.values())
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))
        for slot, own in held.values():
            for name, layer in layers.items():
                if layer.a is None or layer.b is None:
                    assert name not in own
                    continue
                a, b = layer.a[slot.start : slot.end], layer.b[slot.start : slot.end]
                if name in own:
                    assert torch.equal(a, own[name][0])
                    assert torch.equal(b, own[name][1])
                else:
                    assert not a.any()
                    assert not b.any()
    assert slots.capacity <= 2 * 3 * 10 + 10


def test_wrapping_and_unwrapping() -> None:
    """All linear layers are wrapped under their own names, the logits layer is known, and unwrapping undoes it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
            self.head = nn.Linear(2, 3)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.block(x))

    model = Model()
    before = dict(model.named_modules())
    x = torch.randn(2, 4)
    expected = model(x)
    wrapped = wrap_linears(model, LoraContext())
    assert set(wrapped) == {"block.0", "block.2", "head"}
    assert [name for name, layer in wrapped.items() if layer.makes_logits] == ["head"]
    assert torch.equal(model(x), expected)
    assert wrapped["block.2"].weight is before["block.2"].weight
    assert (wrapped["block.2"].in_features, wrapped["block.2"].out_features, wrapped["block.2"].bias) == (4, 2, None)
    unwrap_linears(model, wrapped)
    assert dict(model.named_modules()) == before
