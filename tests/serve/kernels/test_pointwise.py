"""The kernels between a decoder's products give what plain torch gives, and touch nothing else."""

import os

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # as tests/conftest.py does, which a GPU machine may have to leave out
pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from serve.kernels import pointwise, reference
from serve.kernels.choose import choose_kernels
from serve.kernels.pointwise_check import CHECKS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = st.sampled_from(list(TOLERANCE))
quick = settings(deadline=None, max_examples=15, phases=(Phase.explicit, Phase.generate))


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for rounding, relative to the largest entry; what is not a number is at the same places."""
    assert got.dtype == wanted.dtype
    size = float(wanted.float().nan_to_num().abs().max())
    torch.testing.assert_close(got, wanted, atol=TOLERANCE[got.dtype] * max(size, 1e-3), rtol=0, equal_nan=True)


@quick
@given(dtype=DTYPES, tokens=st.integers(1, 5), size=st.integers(1, 600), has_x=st.booleans(), big=st.booleans())
def test_add_norm(dtype: torch.dtype, tokens: int, size: int, has_x: bool, big: bool) -> None:
    """Any size, a strided x or none, numbers of any magnitude: the norm and, in place, the residual."""
    torch.manual_seed(size)
    wide = (torch.randn(tokens, size + 3) * (100.0 if big else 0.01)).to(DEVICE, dtype)
    x = wide[:, :size] if has_x else None
    residual, weight = torch.randn(tokens, size).to(DEVICE, dtype), torch.randn(size).to(DEVICE, dtype)
    copy = residual.clone()
    got, wanted = pointwise.add_norm(x, residual, weight, 1e-5), reference.add_norm(x, copy, weight, 1e-5)
    near(got, wanted)
    near(residual, copy)


@quick
@given(
    data=st.data(),
    dtype=DTYPES,
    heads=st.sampled_from([(1, 1), (4, 2), (7, 1), (3, 3)]),
    size=st.sampled_from([8, 16, 64, 80]),
    has_norms=st.booleans(),
)
def test_rotate_and_write(data, dtype: torch.dtype, heads: tuple[int, int], size: int, has_norms: bool) -> None:
    """Queries turn in place, keys and values land where they belong, and every other place of the cache stays."""
    torch.manual_seed(size)
    tokens = data.draw(st.integers(1, 4))
    places = data.draw(st.lists(st.integers(0, 47), min_size=tokens, max_size=tokens, unique=True))
    pages, offsets = (
        torch.tensor(each, device=DEVICE) for each in zip(*(divmod(each, 16) for each in places), strict=True)
    )
    sizes = [heads[0] * size, heads[1] * size, heads[1] * size]
    mixed = torch.randn(tokens, sum(sizes)).to(DEVICE, dtype)
    cache = torch.full((2, 3, heads[1], 16, size), float("nan"), dtype=dtype, device=DEVICE)
    angles = tuple(torch.randn(tokens, size).to(DEVICE, dtype) for _ in range(2))
    norms = tuple(torch.randn(size).to(DEVICE, dtype) for _ in range(2)) if has_norms else None
    found = []
    for function in (pointwise.rotate_and_write, reference.rotate_and_write):
        own, into = mixed.clone(), cache.clone()
        q, k, v = (each.unflatten(-1, (-1, size)) for each in own.split(sizes, dim=-1))
        function(q, k, v, angles, norms, 1e-6, (into[0], into[1]), (pages, offsets))
        found.append((q, into[0], into[1]))
        assert torch.equal(own[:, sizes[0] :], mixed[:, sizes[0] :])  # keys and values are read only
    for got, wanted in zip(*found, strict=True):
        near(got, wanted)


@quick
@given(dtype=DTYPES, tokens=st.integers(1, 4), size=st.integers(1, 1500))
def test_silu_multiply(dtype: torch.dtype, tokens: int, size: int) -> None:
    """Halves of one product's output, numbers at which exp overflows included."""
    torch.manual_seed(size)
    both = torch.randn(tokens, 2 * size).to(DEVICE, dtype)
    both[0, 0] = -200.0
    gate, up = both.split(size, dim=-1)
    near(pointwise.silu_multiply(gate, up), reference.silu_multiply(gate, up))


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A kernel that errs in one number is left out when it is chosen, whichever it is."""
    for name in CHECKS:
        sound = getattr(pointwise, name)

        def wrong(*args, sound=sound):
            out = sound(*args)
            target = args[0] if out is None else out
            target.view(-1)[-1:].add_(3) if target.is_contiguous() else target[-1, -1].add_(3)
            return out

        with monkeypatch.context() as patch:
            patch.setattr(pointwise, name, wrong)
            kernels = choose_kernels("triton", DEVICE, torch.float32, (4, 2, 16))
        assert kernels is not None
        assert set(CHECKS) - set(kernels.names) == {name}
        said = [record.getMessage() for record in caplog.records if record.name == "serve.kernels.choose"]
        assert f"{name} is not used: its results differ" in said[-1]
