"""The multi-adapter layer and its slots: every token gets its own adapter's delta and no other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from serve.adapters.slots import Slots
from serve.adapters.stacked import StackedSlots
from serve.kernels import reference
from serve.kernels.choose import Kernels
from serve.lora.in_place import laid_out
from serve.lora.linear import LinearGroup, LoraContext, MultiLoraLinear, shared_inputs, unwrap_linears, wrap_linears
from serve.lora.product import Segment, Slot, batch_in_place, lora_batch

IN, OUT = 24, 16
CPU = torch.device("cpu")


def factors(seed: int, rank: int, modules: tuple[str, ...] = ("q", "v")) -> dict:
    """module -> (A (in, rank), B (rank, out))."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(IN, rank, generator=generator), torch.randn(rank, OUT, generator=generator))
        for name in modules
    }


def drop(slots: Slots, digest: str) -> None:
    """Free an adapter's slot, and the memory of its place."""
    slot = slots.free(digest)
    if slot is not None:
        slots.compact(slot.rank)


def layers_of() -> tuple[dict[str, MultiLoraLinear], LoraContext]:
    """Two layers with one input and a third alone."""
    torch.manual_seed(0)
    context = LoraContext()
    bases = {name: nn.Linear(IN, OUT) for name in "qvo"}
    together = LinearGroup([bases["q"], bases["v"]], context)
    layers = {name: MultiLoraLinear(bases[name], together, place) for place, name in enumerate("qv")}
    layers["o"] = MultiLoraLinear(bases["o"], LinearGroup([bases["o"]], context), 0)
    return layers, context


def layers_and_slots(max_slots: int = 8) -> tuple[dict[str, MultiLoraLinear], StackedSlots, LoraContext]:
    """The same with stacks."""
    layers, context = layers_of()
    return layers, StackedSlots(layers, torch.float32, CPU, max_slots), context


@pytest.mark.parametrize("way", ["segments", "grid", "in place", "in place, kernel"])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 1, 9), (4, 9, 4)], ids=str)
@pytest.mark.parametrize("counts", [(5,), (1, 1, 1), (4, 1, 7), (3, 0, 2), (2, 2, 2)], ids=str)
@torch.inference_mode()
def test_each_token_gets_its_delta(counts: tuple[int, ...], ranks: tuple[int, ...], way: str) -> None:
    """Mixed ranks, any number of tokens each, some without an adapter: W x + B A x of each token's own."""
    layers, context = layers_of()
    is_stacked = not way.startswith("in place")
    slots = StackedSlots(layers, torch.float32, CPU, 8) if is_stacked else Slots(layers, 8)
    context.kernels = Kernels({"add_parts": reference.add_parts} if way.endswith("kernel") else {})
    held = {str(index): factors(index, rank, ("q", "v", "o")[: 1 + index]) for index, rank in enumerate(ranks)}
    segments, end = [], 2
    for index, count in enumerate(counts):
        slots.put(str(index), held[str(index)], keep=held.keys())
        if count:
            segments.append((end, end + count, str(index)))
        end += count
    x = torch.randn(1, end + 3, IN)
    places = slots.find(each for _, _, each in segments)
    batch = [Segment(start, stop, places[each]) for start, stop, each in segments]
    context.tokens = (
        lora_batch(batch, CPU, 1000 * (way == "grid"))
        if is_stacked
        else batch_in_place(batch, has_kernel=way.endswith("kernel"))
    )
    for name, layer in layers.items():
        expected = layer.base(x)
        for start, stop, each in segments:
            if name in held[each]:
                a, b = held[each][name]
                expected[0, start:stop] += x[0, start:stop] @ a @ b
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-5)


@torch.inference_mode()
def test_no_adapter_is_the_base() -> None:
    """Without an adapter in the batch, or for a layer no adapter has, the result is the base's, bit for bit."""
    layers, slots, _ = layers_and_slots()
    x = torch.randn(2, 3, IN)
    for layer in layers.values():
        assert torch.equal(layer(x), layer.base(x))
    slots.put("a", factors(1, 4), keep=set())
    for layer in layers.values():
        assert torch.equal(layer(x), layer.base(x))
    assert lora_batch([], CPU, 64) is None


@torch.inference_mode()
def test_layers_with_one_input_are_computed_once() -> None:
    """The second layer asked takes what the first one's call computed, for that very tensor only."""
    layers, _, context = layers_and_slots()
    context.tokens = lora_batch([Segment(0, 1, Slot(4, 0))], CPU, 64)  # without adapters each is a layer like any other
    calls = []
    for name in "qv":
        layers[name].base.register_forward_hook(lambda module, *_: calls.append(module))
    x, y = torch.randn(2, IN), torch.randn(2, IN)
    for tensor in (x, y, y, x):
        for name in "qv":
            assert torch.equal(layers[name](tensor), nn.functional.linear(tensor, *layers[name].base.parameters()))
    assert torch.equal(layers["q"](x), layers["q"](x + 0))
    assert calls.count(layers["q"].base) <= 6
    layers["v"](x)
    layers["v"](y)
    assert layers["q"].group._outs.keys() == {0}


@torch.inference_mode()
def test_overflow_stays_with_its_adapter() -> None:
    """An adapter whose product overflows does not reach its neighbours in the batch."""
    layers, slots, context = layers_and_slots()
    wild = {"q": (torch.full((IN, 4), 3e38), torch.full((4, OUT), 3e38))}
    tame = factors(1, 4)
    keep = {"wild", "tame"}
    segments = [Segment(0, 1, slots.put("wild", wild, keep)), Segment(1, 3, slots.put("tame", tame, keep))]
    context.tokens = lora_batch(segments, CPU, 64)
    x = torch.rand(1, 4, IN) + 1
    out, base = layers["q"](x)[0], layers["q"].base(x)[0]
    a, b = tame["q"]
    torch.testing.assert_close(out[1:3], base[1:3] + x[0, 1:3] @ a @ b, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out[3], base[3])
    assert not torch.isfinite(out[0]).all()


@given(
    uses=st.lists(
        st.tuples(st.sets(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from(["q", "v", "qv", "o"])),
        max_size=25,
    ),
    dropped=st.lists(st.integers(0, 9), max_size=4),
)
@torch.inference_mode()
def test_slots_never_mix(uses, dropped) -> None:
    """Whatever is put, replaced, moved and dropped, adapters in use have places of their own."""
    layers, slots, _ = layers_and_slots(max_slots=4)
    modules_of: dict[str, str] = {}
    for step, (wanted, modules) in enumerate(uses):
        keep = {str(number) for number in wanted}
        owners = {
            digest: factors(int(digest), 1 + int(digest) % 3, tuple(modules_of.setdefault(digest, modules)))
            for digest in sorted(keep)
        }
        for digest, own in owners.items():
            if digest not in slots:
                slots.put(digest, own, keep)
        held = slots.find(owners)
        assert len(set(held.values())) == len(held)
        for digest, own in owners.items():
            slot = held[digest]
            for name, layer in layers.items():
                stack = layer.group.b[layer.place].get(slot.rank)
                if stack is None:
                    assert name not in own
                    continue
                a = layer.group.a[slot.rank][slot.index][:, layer.place * slot.rank : (layer.place + 1) * slot.rank]
                if name in own:
                    assert torch.equal(a, own[name][0])
                    assert torch.equal(stack[slot.index], own[name][1])
                else:
                    assert not a.any()
                    assert not stack[slot.index].any()
        if step < len(dropped) and str(dropped[step]) not in keep:
            drop(slots, str(dropped[step]))
            assert str(dropped[step]) not in slots
        assert sum(slots._capacity.values()) <= 4
    for record in slots.records.all():
        drop(slots, record.digest)
    assert slots.num_bytes == 0


@given(
    uses=st.lists(st.sets(st.integers(0, 9), min_size=1, max_size=4), max_size=25),
    lost=st.lists(st.integers(0, 9), max_size=8),
)
@torch.inference_mode()
def test_slots_in_place_are_the_memory_itself(uses: list[set[int]], lost: list[int]) -> None:
    """Whatever comes, goes, and is taken out of memory meanwhile: places differ, and nothing is copied or held."""
    layers, _ = layers_of()
    slots = Slots(layers, 4)
    held = {str(number): laid_out(factors(number, 1 + number % 3, ("q", "v", "o")), layers) for number in range(10)}
    for step, wanted in enumerate(uses):
        keep = {str(number) for number in wanted}
        for digest in sorted(keep):
            if digest not in slots:
                slots.put(digest, held[digest], keep)
        found = slots.find(sorted(keep))
        assert len({slot.index for slot in found.values()}) == len(keep)
        assert all(slot.parts is held[digest].parts for digest, slot in found.items())
        assert len(slots) <= 4
        if step < len(lost) and str(lost[step]) in slots:  # as the pool does that needs its memory
            slots.records[str(lost[step])].slot = None
            assert str(lost[step]) not in slots
    assert slots.num_bytes == 0


def test_ranks_of_one_input_may_differ() -> None:
    """A layer of lower rank beside another is as it was read; one that is left alone takes no memory."""
    layers, _ = layers_of()
    own = {"q": factors(1, 2)["q"], "v": factors(2, 5)["v"]}
    held = laid_out(own, layers)
    for name, pair in own.items():
        assert all(map(torch.equal, held[name], pair))
    assert held.parts.nbytes == 4 * 2 * 5 * (IN + OUT)
    alone = laid_out({"v": own["v"]}, layers)
    assert alone.parts.nbytes == 4 * 5 * (IN + OUT)
    (part,) = alone.parts
    assert (part.columns, part.bs[0]) == ((-1, 0), None)


@torch.inference_mode()
def test_slots_move_when_others_make_room() -> None:
    """Where an adapter is changes when another rank needs its stack's spare places, and `find` says where to."""
    layers, slots, _ = layers_and_slots(max_slots=3)
    own = {name: factors(index, rank) for index, (name, rank) in enumerate((("a", 2), ("b", 2), ("c", 2), ("d", 4)))}
    for name in "abc":
        slots.put(name, own[name], set("abc"))
    before = slots.find("bc")
    slots.put("d", own["d"], set("bcd"))
    after = slots.find("bcd")
    assert after["b"] != before["b"]
    for name, slot in after.items():
        group = layers["q"].group
        assert torch.equal(group.a[slot.rank][slot.index][:, : slot.rank], own[name]["q"][0])


def test_shared_inputs_are_found() -> None:
    """Layers of one parent that get the same tensor form a group; a layer that is used twice does not."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o, self.twice = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.twice(self.twice(self.o(self.q(x) + self.k(x)))) + x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 4)
            self.blocks = nn.Sequential(Block(), Block())

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.blocks(self.embed(input_ids))

    assert shared_inputs(Model()) == [["blocks.0.q", "blocks.0.k"], ["blocks.1.q", "blocks.1.k"]]


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
    assert [name for name, layer in wrapped.items() if layer.group.makes_logits] == ["head"]
    assert torch.equal(model(x), expected)
    assert wrapped["block.2"].weight is before["block.2"].weight
    assert (wrapped["block.2"].in_features, wrapped["block.2"].out_features, wrapped["block.2"].bias) == (4, 2, None)
    unwrap_linears(model, wrapped)
    assert dict(model.named_modules()) == before
