"""The kernels compute what plain torch computes, of their own data only: Triton's on a GPU, or interpreted on the CPU,
and there those of C."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # as tests/conftest.py does, which a GPU machine may have to leave out
pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from adapterhub_local.base.attention import AttentionKind
from adapterhub_local.errors import InputError
from serve.engine.options import EngineOptions
from serve.kernels import attention, launch, lora, nf4, reference
from serve.kernels.choose import Kernels, choose_kernels
from serve.kernels.compiled import CannotCompile
from serve.kernels.cpu import load_kernels
from serve.kernels.part import Part
from serve.lora import product
from serve.lora.product import Segment, lora_batch
from serve.lora.weights import is_four_bit, plain_absmax
from tests.serve.lora.test_lora import factors, layers_and_slots

ROOT = Path(__file__).parents[3]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
TRITON = {"add_lora": lora.add_lora, "paged_attention": attention.paged_attention}
try:
    C = load_kernels() if DEVICE.type == "cpu" else {}
except CannotCompile:
    C = {}
KINDS = st.sampled_from([(TRITON, dtype) for dtype in TOLERANCE] + ([(C, torch.float32)] * 2 if C else []))
PRODUCTS = [(nf4.multiply, dtype) for dtype in nf4.TYPES if nf4.why_not(DEVICE, dtype) is None]
PRODUCTS += [(C["multiply"], torch.float32)] if C else []
# a smaller failing case would take the interpreter minutes to find
quick = settings(max_examples=12, phases=(Phase.explicit, Phase.generate), deadline=None)  # a kernel compiles first


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Tensors are made where the kernels run."""
    with DEVICE:
        yield


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for rounding, relative to the largest entry."""
    assert got.dtype == wanted.dtype
    size = float(wanted.float().abs().max()) if wanted.numel() else 1.0
    torch.testing.assert_close(got, wanted, atol=TOLERANCE[got.dtype] * max(size, 1e-3), rtol=0)


def unstacked(a: torch.Tensor, bs: Sequence[torch.Tensor | None]) -> list[Part]:
    """The part of each slot of stacks."""
    rank = a.shape[2] // len(bs)
    columns = tuple(place * rank if b is not None else -1 for place, b in enumerate(bs))
    none = (None,) * len(bs)
    return [
        Part(rank, a[slot], columns, tuple(None if b is None else b[slot] for b in bs), none) for slot in range(len(a))
    ]


@quick
@given(data=st.data(), kind=KINDS, rank=st.integers(1, 70), sizes=st.lists(st.integers(1, 150), min_size=1, max_size=4))
def test_lora(data, kind: tuple[dict, torch.dtype], rank: int, sizes: list[int]) -> None:
    """Any rank, any number of layers and tiles: each token gets the delta of its slot, and the other slots are NaN."""
    own, dtype = kind
    torch.manual_seed(data.draw(st.integers(0, 99)))
    in_features, num_slots = data.draw(st.sampled_from([8, 72, 300])), 5
    used = data.draw(st.lists(st.integers(-1, num_slots - 1), min_size=1, max_size=4))
    counts = [data.draw(st.integers(0, lora.TILE)) for _ in used]
    starts = [2 + sum(counts[:index]) for index in range(len(counts))]  # two tokens before all tiles, one behind
    tiles = torch.tensor(list(zip(starts, counts, used, strict=True)), dtype=torch.int32)
    num_tokens = sum(counts) + 3
    a = torch.full((num_slots, in_features, len(sizes) * rank), NAN, dtype=dtype)
    bs: list[torch.Tensor | None] = [torch.full((num_slots, rank, size), NAN, dtype=dtype) for size in sizes]
    if len(sizes) > 1:
        bs[data.draw(st.integers(0, len(sizes) - 1))] = None
    for slot in set(used) - {-1}:
        a[slot] = torch.randn(a.shape[1:]) / in_features**0.5
        for b in bs:
            if b is not None:
                b[slot] = torch.randn(b.shape[1:])
    x = torch.randn(num_tokens, in_features).to(dtype)
    wide = torch.randn(num_tokens, sum(sizes)).to(dtype)  # outputs may be views of one tensor
    got, wanted = wide.clone(), wide.clone()
    if "add_parts" in own:
        own["add_parts"](got.split(sizes, dim=-1), x, unstacked(a, bs), tiles)
    else:
        own["add_lora"](got.split(sizes, dim=-1), x, a, bs, tiles)
    reference.add_lora(wanted.split(sizes, dim=-1), x, a, bs, tiles)

    assert_same(got, wanted)
    assert torch.equal(got[:2], wide[:2])
    assert torch.equal(got[-1], wide[-1])


@pytest.mark.skipif(not C, reason="there are no kernels of C here")
@pytest.mark.parametrize("rank", [127, 128, 129, 300, 200_000])
def test_any_rank_fits_the_stack(rank: int) -> None:
    """An adapter of a rank that nobody trains ends no server: what is summed up at a time has one size."""
    torch.manual_seed(0)
    x, outs = torch.randn(16, 64), [torch.zeros(16, 32), torch.zeros(16, 32)]
    part = Part(rank, torch.randn(64, rank) / 8, (0,), (torch.randn(rank, 32) / rank**0.5,), (None,))
    tiles = torch.tensor([[0, 16, 0]], dtype=torch.int32)
    C["add_parts"](outs[:1], x, [part], tiles)
    reference.add_parts(outs[1:], x, [part], tiles)
    assert_same(*outs)


def test_lora_split_input() -> None:
    """A long input is read in parts by several programs, and their sums are one."""
    torch.manual_seed(0)
    x, a, b = torch.randn(3, 1100), torch.randn(2, 1100, 6) / 33, torch.randn(2, 6, 40)
    tiles = torch.tensor([[0, 2, 1], [2, 1, 0], [0, 0, 0]], dtype=torch.int32)
    got, wanted = torch.zeros(3, 40), torch.zeros(3, 40)
    assert lora._parts(len(tiles), 1100, 16) > 1
    lora.add_lora([got], x, a, [b], tiles)
    reference.add_lora([wanted], x, a, [b], tiles)
    assert_same(got, wanted)


@quick
@given(
    data=st.data(),
    kind=KINDS,
    head_dim=st.sampled_from([16, 64, 80, 256]),
    repeats=st.sampled_from([1, 2, 7]),
    window=st.sampled_from([None, 1, 5, 40]),
    softcap=st.sampled_from([None, 2.0]),
)
def test_paged_attention(data, kind, head_dim: int, repeats: int, window, softcap) -> None:
    """Any lengths, windows, caps and groups of heads; pages of others and places not yet written are NaN."""
    own, dtype = kind
    torch.manual_seed(data.draw(st.integers(0, 99)))
    page, kv_heads, max_pages = 16, 2, 6
    lengths = data.draw(st.lists(st.integers(0, page * max_pages), min_size=1, max_size=3))
    order = torch.randperm(len(lengths) * max_pages + 2)  # two pages are nobody's
    tables = order[: len(lengths) * max_pages].view(len(lengths), max_pages).int()
    keys, values = torch.full((2, len(order), kv_heads, page, head_dim), NAN, dtype=dtype)
    for row, length in enumerate(lengths):
        for place in range(length):
            for cache in (keys, values):
                cache[tables[row, place // page], :, place % page] = torch.randn(kv_heads, head_dim).to(dtype)
        tables[row, -(-length // page) :] = 2**30  # never to be followed
    query = torch.randn(len(lengths), repeats * kv_heads, head_dim).to(dtype)
    tensors = query, keys, values, tables, torch.tensor(lengths, dtype=torch.int32)
    asked = AttentionKind(0.3, window=window, softcap=softcap)
    got, wanted = own["paged_attention"](*tensors, asked), reference.paged_attention(*tensors, asked)

    assert torch.isfinite(wanted).all()
    assert_same(got, wanted)


@pytest.mark.parametrize("window", [None, 100, 600])
@pytest.mark.parametrize("own", [TRITON, C], ids=["triton", "c"])
def test_split_attention(own: dict, window: int | None) -> None:
    """Long rows are computed in parts and joined, also where a part or a row has no place in sight."""
    if not own:
        pytest.skip("there are no kernels of C here")
    torch.manual_seed(0)
    lengths = torch.tensor([700, 1, 0, 257], dtype=torch.int32)
    tables = torch.randperm(200).view(4, 50).int()
    keys, values = torch.randn(2, 200, 1, 16, 32)
    query = torch.randn(4, 4, 32)
    tensors = query, keys, values, tables, lengths, AttentionKind(1.0, window=window)
    assert_same(own["paged_attention"](*tensors), reference.paged_attention(*tensors))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the layers of this test are on the CPU, where no GPU kernel runs")
@quick
@given(
    counts=st.lists(st.tuples(st.integers(0, 40), st.integers(-1, 4)), min_size=1, max_size=5),
    long=st.booleans(),
)
@torch.inference_mode()
def test_layers_with_tiles(counts: list[tuple[int, int]], long: bool) -> None:
    """Layers that share an input give with the kernels what they give without, whatever ranks and lengths mix."""
    layers, slots, context = layers_and_slots()
    ranks = (3, 16, 16, 3, 40)
    for number, rank in enumerate(ranks):
        slots.put(str(number), factors(number, rank, ("q", "v", "o")[number % 2 :]), keep=set("01234"))
    counts = sorted(counts, key=lambda each: each[1]) + ([(product.LONG + 5, 4)] if long else [])
    held = slots.find("01234")
    segments, end = [], 0
    for count, number in counts:
        if number >= 0 and count:
            segments.append(Segment(end, end + count, held[str(number)]))
        end += count
    x = torch.randn(1, end + 1, 24)
    context.tokens = lora_batch(segments, torch.device("cpu"), 0)
    wanted = {name: layer(x) for name, layer in layers.items()}
    context.kernels = choose_kernels("triton", torch.device("cpu"), torch.float32, (4, 2, 16), check=False)
    assert context.kernels is not None
    context.tokens = product.tiled_batch(segments, torch.device("cpu"))
    for name, layer in layers.items():
        torch.testing.assert_close(layer(x.clone()), wanted[name], atol=1e-4, rtol=1e-5)
    assert context.kernels.has("add_lora")


def test_kernels_are_checked_before_use(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Kernels that give what torch gives are taken; one that errs or fails is left out, and a warning says why."""
    kernels = choose_kernels("triton", DEVICE, torch.bfloat16, (7, 1, 48))
    assert kernels is not None
    assert kernels.has("add_lora")
    assert kernels.has("paged_attention")
    assert not caplog.records

    monkeypatch.setattr(lora, "add_lora", lambda outs, *_: outs[0].add_(1))
    monkeypatch.setattr(attention, "paged_attention", lambda *_, **__: torch.zeros(()).view(3))
    monkeypatch.setattr(nf4, "why_not", lambda *_: None)
    monkeypatch.setattr(nf4, "multiply", lambda *_: torch.full((), NAN))
    kernels = choose_kernels("triton", DEVICE, torch.float32, (4, 2, 16))
    assert kernels is not None
    assert not any(kernels.has(name) for name in ("add_lora", "paged_attention", "multiply"))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3
    assert "multiply is not used: its results differ from plain torch's by inf" in warnings[2]
    assert "add_lora is not used: its results differ" in warnings[0]
    assert "paged_attention is not used: RuntimeError: shape" in warnings[1]


def test_a_kernel_that_fails_later_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """A failure on a shape not seen before costs a warning, not the answer; running out of memory is reported as is."""
    calls = []

    def broken(*_: object) -> None:
        calls.append(1)
        raise torch.OutOfMemoryError if len(calls) == 1 else RuntimeError("no image for this device\nmore")

    kernels = Kernels({"add_lora": broken})
    x, a, b, out = torch.randn(3, 8), torch.randn(1, 8, 2), torch.randn(1, 2, 5), torch.zeros(3, 5)
    tiles = torch.tensor([[0, 3, 0]], dtype=torch.int32)
    with pytest.raises(torch.OutOfMemoryError):
        kernels.add_lora([out], x, a, [b], tiles)
    for _ in range(2):
        kernels.add_lora([out], x, a, [b], tiles)

    torch.testing.assert_close(out, 2 * x @ a[0] @ b[0])
    assert len(calls) == 2
    assert [record.getMessage().split(". ")[0] for record in caplog.records] == [
        "the kernel add_lora is not used: RuntimeError: no image for this device"
    ]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="asks for kernels on a CPU without an interpreter")
def test_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU or without Triton `triton` is an error; `torch` has none, and C's only compute in float32."""
    cpu = torch.device("cpu")
    assert choose_kernels("torch", cpu, torch.float32, (4, 2, 16)) is None
    assert choose_kernels("auto", cpu, torch.bfloat16, (4, 2, 16)) is None
    with pytest.raises(InputError, match="they compute in float32, the model in bfloat16"):
        choose_kernels("c", cpu, torch.bfloat16, (4, 2, 16))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(InputError, match="for a GPU, the model is on the cpu"):
        choose_kernels("triton", cpu, torch.float32, (4, 2, 16))
    monkeypatch.setitem(sys.modules, "serve.kernels.lora", None)
    monkeypatch.delattr("serve.kernels.lora")
    with pytest.raises(InputError, match="Triton cannot be imported"):
        choose_kernels("triton", cpu, torch.float32, (4, 2, 16))
    with pytest.raises(InputError, match="it must be auto, triton, c, torch"):
        EngineOptions(kernels="cuda")


@pytest.mark.skipif(not C, reason="there are no kernels of C here")
def test_neighbours_change_no_bit() -> None:
    """Of C's kernels a token gets the very same numbers alone and among others, by one thread and by two."""
    torch.manual_seed(0)
    x, a = torch.randn(7, 320), torch.randn(2, 320, 60)
    sizes, bs = (70, 130, 16), [torch.randn(2, 20, size) for size in (70, 130, 16)]
    packed, absmax, code = torch.randint(256, (96 * 160, 1)).byte(), torch.rand(480) + 0.5, torch.linspace(-1, 1, 16)
    keys, values = torch.randn(2, 200, 2, 16, 40)
    tables, lengths = torch.randperm(200)[:180].view(3, 60).int(), torch.tensor([900, 3, 700], dtype=torch.int32)
    query = torch.randn(3, 14, 40)

    def results(rows: slice) -> list[torch.Tensor]:
        own, outs = x[rows].clone(), [torch.zeros(len(x[rows]), size) for size in sizes]
        C["add_parts"](outs, own, unstacked(a, bs), torch.tensor([[0, len(own), 1]], dtype=torch.int32))
        some = (query[rows].clone(), keys, values, tables[rows].clone(), lengths[rows].clone())
        return [
            torch.cat(outs, 1),
            C["multiply"](own, packed, absmax, code, 96),
            C["paged_attention"](*some, AttentionKind(0.2)),
        ]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    together = results(slice(0, 7))
    torch.set_num_threads(1)
    try:
        for row in range(7):
            for got, wanted in zip(results(slice(row, row + 1)), together, strict=True):
                assert torch.equal(got, wanted[row : row + 1])
    finally:
        torch.set_num_threads(before)


def compiled(*options: str) -> dict[str, dict[str, int]]:
    """What the compiler made for an H100, in a process that does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.serve.kernels.compile_kernels", "90", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])["kernels"]
    return found


@pytest.mark.timeout(300)
def test_kernels_compile_for_a_gpu() -> None:
    """Every kernel fits the shared memory that smaller GPUs have, and no thread spills a register."""
    found = compiled("--dtype", "bfloat16")
    own = {"_shrink", "_expand", "_attend", "_join", "_add_norm", "_rotate_and_write", "_silu_multiply"}
    assert found.keys() == own
    assert max(each["shared"] for each in found.values()) <= 99 * 1024  # of a program on an RTX 3090 or 4090
    assert not [name for name, each in found.items() if each["spilled"]]


@pytest.mark.timeout(300)
def test_traffic_compiles_nothing() -> None:
    """However many rows a step has and however long they are, a kernel has a few variants, all of them soon seen."""
    found = compiled("--steps")
    assert {name: each["variants"] for name, each in found.items() if each["variants"] > 6} == {}
    assert found["_attend"]["variants"] == 2  # rows of one part, and of several


@pytest.mark.skipif(not PRODUCTS, reason="neither C nor CUDA C++ can be compiled here")
@quick
@given(
    product=st.sampled_from(PRODUCTS or [None]),
    tokens=st.integers(1, 70),
    size=st.integers(1, 130),
    blocks=st.sampled_from([1, 2, 9]),
    nested=st.booleans(),
    kind=st.sampled_from(["nf4", "fp4"]),
)
def test_four_bit_product(product, tokens: int, size: int, blocks: int, nested: bool, kind: str) -> None:
    """Any number of tokens and outputs: the product with what bitsandbytes dequantises the weights to."""
    from bitsandbytes import functional

    multiply, dtype = product
    torch.manual_seed(tokens)
    weight, x = torch.randn(size, 64 * blocks).to(dtype), torch.randn(tokens, 64 * blocks).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    absmax = plain_absmax(state)
    got = multiply(x, packed, absmax, state.code, size)
    wanted = x.float() @ functional.dequantize_4bit(packed, state).float().T

    assert absmax.dtype == torch.float32
    assert_same(got, wanted.to(dtype))
    assert_same(reference.multiply(x, packed, absmax, state.code, size), wanted.to(dtype))


def test_which_weights_can_be_multiplied() -> None:
    """Blocks must be of 64 and end with the rows; a plain weight is none of our business."""
    from bitsandbytes.nn import Params4bit

    good = Params4bit(torch.randn(8, 128), requires_grad=False, quant_type="nf4", blocksize=64).to(DEVICE)
    odd = Params4bit(torch.randn(8, 96), requires_grad=False, quant_type="nf4", blocksize=64).to(DEVICE)
    wide = Params4bit(torch.randn(8, 128), requires_grad=False, quant_type="nf4", blocksize=128).to(DEVICE)
    assert [is_four_bit(each) for each in (good, odd, wide, torch.randn(8, 128))] == [True, False, False, False]
