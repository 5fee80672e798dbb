"""Memory in huge pages: what is moved there is the same, one behind the other, and goes with its last tensor."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve.kernels import arena as rooms
from serve.kernels.arena import ALIGNED, Arena

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is moved on other systems")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8])
SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=3)


@given(kinds=st.lists(st.tuples(SHAPES, DTYPES, st.sampled_from([None, torch.float32, torch.bfloat16])), max_size=9))
def test_what_is_moved_is_the_same(kinds: list[tuple[list[int], torch.dtype, torch.dtype | None]]) -> None:
    """Any shapes and dtypes: equal numbers, aligned, none over another."""
    arena, generator = Arena(), torch.Generator().manual_seed(0)
    given = [torch.randint(0, 100, shape, generator=generator).to(kind) for shape, kind, _ in kinds]
    moved = [arena.moved(each, dtype) for each, (_, _, dtype) in zip(given, kinds, strict=True)]
    for before, after, (_, _, dtype) in zip(given, moved, kinds, strict=True):
        assert after.is_contiguous()
        assert after.data_ptr() % ALIGNED == 0
        assert torch.equal(after, before.to(dtype or before.dtype))
    spans = sorted((each.data_ptr(), each.nbytes) for each in moved if each.nbytes)
    assert all(begin + size <= behind for (begin, size), (behind, _) in itertools.pairwise(spans))


def test_transposed_and_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in another order is laid out anew; what a piece cannot hold has one of its own."""
    monkeypatch.setattr(rooms, "CHUNK", 1 << 12)
    arena = Arena()
    given = [torch.arange(6.0).view(2, 3).t(), torch.arange(5000.0), torch.arange(3.0)]
    moved = [arena.moved(each) for each in given]
    assert all(torch.equal(after, before) and after.is_contiguous() for before, after in zip(given, moved, strict=True))


def test_memory_goes_with_the_last_tensor() -> None:
    """Nothing else keeps it."""
    arena = Arena()
    moved = arena.moved(torch.arange(3.0))
    size = _mapped()
    del arena
    assert _mapped() == size
    del moved
    assert _mapped() < size


def _mapped() -> int:
    """Pages that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0])
