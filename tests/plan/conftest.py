"""Plans are made for GPUs as they are: what computes in bfloat16 is planned so."""

import pytest


@pytest.fixture(autouse=True)
def compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests compute in float32 on every machine."""
    monkeypatch.delenv("QHUB_COMPUTE")
