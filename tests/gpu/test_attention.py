"""On a GPU: torch's attention over examples of several lengths computes what the reference does, gradients too."""

import pytest
import torch

from adapterhub_local.base.attention import AttentionKind
from adapterhub_local.rows.attention import each_alone
from adapterhub_local.rows.layout import Layout
from adapterhub_local.rows.varlen import has_packed_kernel, packed_kernel
from tests.gpu.check import NO_GPU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("prefix", [0, 33])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
def test_packed_attention(heads: tuple[int, int], prefix: int, window: int | None) -> None:
    """bfloat16 within 2 % of float32, of result and gradients."""
    layout = Layout(prefix, (40, 7, 129))
    given = [torch.randn(1, count, layout.tokens, 64).to("cuda", torch.bfloat16) for count in (*heads, heads[1])]
    if not has_packed_kernel(given[0]):
        pytest.skip("this torch or this card has no packed attention")
    found = []
    for attend, dtype in ((packed_kernel, torch.bfloat16), (each_alone, torch.float32)):
        q, k, v = (tensor.detach().to(dtype).requires_grad_() for tensor in given)
        out = attend(q, k, v, layout, AttentionKind(0.125, window=window))
        toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        found.append([out, *torch.autograd.grad(out, (q, k, v), toward)])
    for got, expected in zip(*found, strict=True):
        assert (got.float() - expected).norm() <= 0.02 * expected.norm()
