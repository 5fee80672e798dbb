"""The law: what PEFT computes with an adapter it computes with what is written here, and a merge of one is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_local.adopt import adopt
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import InputError
from adapterhub_local.merge.merge import merge_to_path
from adapterhub_local.merge.plan import make_plan
from adapterhub_local.registry import Registry, Version
from serve.engine.build import build_engine
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams
from tests.lora.peft_kinds import REFUSED, TAKEN, load, logits, logits_by_peft, make

SERVED = (
    *(
        "list",
        "Unsloth's pattern",
        "all-linear",
        "patterns that overlap",
        "rsLoRA with patterns",
        "layers_to_transform",
    ),
    *("exclude_modules, pattern", "DoRA of all", "lm_head", "bfloat16", "compiled", "inside of a multimodal model"),
    *("tokens", "tokens of the head", "tokens of both", "tokens in bfloat16", "tokens of a compiled model"),
)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    """The tiny model, to be copied."""
    return load(tiny_folder)


def add(folder: Path, base: BaseInfo, registry: Registry, staging: Path) -> Version:
    """The adapter as `qhub add` takes it in."""
    staging.mkdir()
    return adopt(folder, "a", registry, base.lineage(), staging_folder=staging, info=base)


def test_the_table_is_long_enough() -> None:
    """Sixty kinds and more, of which a dozen are served."""
    assert len(TAKEN) + len(REFUSED) >= 60
    assert set(SERVED) <= set(TAKEN)
    assert len(SERVED) >= 12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TAKEN)
def test_peft_computes_the_same_before_and_after(
    name: str, model: Any, tiny_base: BaseInfo, registry: Registry, tmp_path: Path
) -> None:
    """In every mode of loading, of what was added and of a merge of one; nothing is missing and nothing is made up."""
    kind = TAKEN[name]
    folder, made = make(model, kind, tmp_path / "in")
    wanted = logits(made)
    version = add(folder, tiny_base, registry, tmp_path / "staging")
    places = {"added": version.path}
    if kind.is_plain:
        merge_to_path(make_plan([str(folder)], [1.0], registry), tmp_path / "merged")
        places["merged"] = tmp_path / "merged"
    assert float((wanted - logits(model)).abs().max()) > 1e-2, "the adapter must change something"
    for place, path in places.items():
        for low in (False, True):
            found = logits_by_peft(model, path, low=low)
            torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4, msg=lambda m: f"{place} {low}: {m}")  # noqa: B023


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_kind_that_is_not_taken_says_why(
    name: str, model: Any, tiny_base: BaseInfo, registry: Registry, tmp_path: Path
) -> None:
    """Added or merged, the config's own reason is the first that a person reads."""
    kind, reason = REFUSED[name]
    folder, _ = make(model, kind, tmp_path / "in")
    with pytest.raises(InputError, match=reason):
        add(folder, tiny_base, registry, tmp_path / "staging")
    with pytest.raises(InputError, match=reason):
        make_plan([str(folder)], [1.0], registry)
    assert registry.versions() == []


@pytest.mark.filterwarnings("ignore")
def test_served_as_peft_computes(model: Any, tiny_base: BaseInfo, registry: Registry, tmp_path: Path) -> None:
    """A dozen kinds in one batch of the engine give the log-probabilities of PEFT on the same NF4 base."""
    base = load_base(tiny_base, device="cpu")
    engine = build_engine(base, EngineOptions(max_rows=32, tokens_per_step=512, max_adapters=32))
    prompt = tuple(range(3, 15))
    requests, wanted = [], {}
    for name in SERVED:
        folder, _ = make(model, TAKEN[name], tmp_path / name.replace(" ", "-"))
        version = add(folder, tiny_base, registry, tmp_path / f"staging-{len(wanted)}")
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=5)
        requests.append(Request(name, prompt, params, engine.pool.acquire(version).digest))
        wanted[name] = torch.log_softmax(logits_by_peft_on(tiny_base, version.path)[-1], -1)
    engine.submit(*requests)
    found = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            if output.sampled:
                found[output.request_id] = output.sampled
    for name, sampled in found.items():
        assert sampled.token == int(wanted[name].argmax()), name
        assert sampled.logprob == pytest.approx(float(wanted[name].max()), abs=1e-4), name
    assert len(found) == len(SERVED)
    assert len({round(float(row.max()), 4) for row in wanted.values()}) >= 8, "they must differ, or this shows nothing"


def logits_by_peft_on(base: BaseInfo, folder: Path) -> torch.Tensor:
    """PEFT's logits on the base as it is stored."""
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(load_base(base, device="cpu").model, folder).eval())
