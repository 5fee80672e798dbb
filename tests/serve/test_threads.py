"""Threads that compute: the one that steps the engine has helpers, the others have none."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from serve.threads import compute_alone, in_passing


def test_only_the_thread_that_asks_computes_alone() -> None:
    """A worker without helpers does not take them from others, nor from threads that come later."""
    before = torch.get_num_threads()
    if before == 1:
        torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1, initializer=compute_alone) as worker:
            assert worker.submit(torch.get_num_threads).result() == 1
            assert worker.submit(lambda: float((torch.ones(300, 300) @ torch.ones(300, 300)).sum())).result() == 27e6
        assert torch.get_num_threads() == max(2, before)
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == max(2, before)
    finally:
        torch.set_num_threads(before)


def test_work_in_passing() -> None:
    """Its result or its error comes back."""
    assert in_passing(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        in_passing(lambda: 1 // 0)
