"""Another library's kernels are taken where a base answers the same with them, and leave no trace where it does not."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import InputError
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.packing import forward, pack
from adapterhub_local.train import liger

PROBE = Example(tuple(range(10, 50)), ((20, 40),))


def code_of(model: Any) -> Any:
    return sys.modules[type(model).__module__]


def fused_norms(model: Any) -> None:
    """What such a library does: other functions in modules, and in the file of their code."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            size, eps = module.weight.shape, module.variance_epsilon
            module.__dict__["forward"] = lambda x, m=module, size=size, eps=eps: torch.rms_norm(x, size, m.weight, eps)
    code_of(model).apply_rotary_pos_emb = _rotated
    code_of(model).left_behind = True


def _rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    cos, sin = cos[:, None], sin[:, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turned(q), turned(k)


def wrong_norms(model: Any) -> None:
    fused_norms(model)
    model.model.norm.__dict__["forward"] = lambda x: 2 * x


def not_a_number(model: Any) -> None:
    fused_norms(model)
    model.model.norm.__dict__["forward"] = lambda x: x * float("nan")


def failing(model: Any) -> None:
    fused_norms(model)
    raise AttributeError("a later transformers has no such module\nsecond line")


@pytest.fixture
def model(tiny_base: BaseInfo, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny base, on which Liger's kernels seem possible."""
    monkeypatch.setattr(liger, "why_not", lambda model: None)
    loaded = load_base(tiny_base).model
    before = dict(vars(code_of(loaded)))
    yield loaded
    for name in vars(code_of(loaded)).keys() - before.keys():
        delattr(code_of(loaded), name)
    vars(code_of(loaded)).update(before)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return forward(model, pack([PROBE]))[0]


def test_what_answers_the_same_stays(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run says so; `torch` never asks."""
    monkeypatch.setattr(liger, "_apply", fused_norms)
    alone = logits(model)
    assert liger.use_liger(model, PROBE, "torch") is None
    assert not hasattr(code_of(model), "left_behind")
    assert liger.use_liger(model, PROBE, "auto") == "norms, rotary embeddings and MLPs are computed by Liger's kernels"
    assert "forward" in vars(model.model.norm)
    assert code_of(model).left_behind
    assert torch.allclose(logits(model), alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("apply", "reason"),
    [
        (wrong_norms, r"they change this base's logits by [\d.]+%, where rounding explains [\d.]+%"),
        (not_a_number, r"they change this base's logits by nan%"),
        (failing, r"they fail on this base \(AttributeError: a later transformers has no such module\)"),
    ],
)
def test_what_does_not_is_taken_back(
    model: Any, apply: Callable[[Any], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a note, or a refusal where it was asked for; modules and their code are what they were."""
    monkeypatch.setattr(liger, "_apply", apply)
    alone, own = logits(model), code_of(model).apply_rotary_pos_emb
    noted = liger.use_liger(model, PROBE, "auto")
    assert noted is not None
    with pytest.raises(InputError, match=reason) as refused:
        liger.use_liger(model, PROBE, "liger")

    assert str(refused.value).startswith(
        f"train.kernels = 'liger': {noted.removeprefix('Liger' + chr(39) + 's kernels are not used: ')}"
    )
    assert torch.equal(logits(model), alone)
    assert code_of(model).apply_rotary_pos_emb is own
    assert not hasattr(code_of(model), "left_behind")
    assert not any("forward" in vars(module) for module in model.modules() if "Norm" in type(module).__name__)


def test_without_a_gpu(tiny_base: BaseInfo) -> None:
    """`auto` goes on without a word, `liger` is refused with the reason."""
    model = load_base(tiny_base, device="cpu").model
    assert liger.use_liger(model, PROBE, "auto") is None
    with pytest.raises(InputError, match="they run on a GPU, and the base is not on one; 'auto' and 'torch' go on"):
        liger.use_liger(model, PROBE, "liger")
    assert not liger.uses_liger(model)
