"""On a GPU: it compiles and runs every kernel, with torch's results."""

import pytest
import torch

from serve.kernels.choose import choose_kernels
from tests.gpu.check import NO_GPU, why_no_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
    pytest.mark.skipif(why_no_triton() is not None, reason=why_no_triton() or ""),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [(32, 8, 128), (14, 2, 64), (8, 4, 256), (32, 32, 80)], ids=str)
def test_kernels_work_here(dtype: torch.dtype, heads: tuple[int, int, int], caplog: pytest.LogCaptureFixture) -> None:
    """The heads of common models, in the dtypes that this GPU has."""
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")
    kernels = choose_kernels("auto", torch.device("cuda"), dtype, heads)

    assert not [record.getMessage() for record in caplog.records]
    assert kernels is not None
