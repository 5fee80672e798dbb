"""DoRA through its base: what PEFT computes with it is what the converted adapter gives, and the loss is reported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import LoadedBase, load_base
from adapterhub_local.base.weights import dequantised
from adapterhub_local.errors import Incompatible
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.merge.dora import through_base
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.cli.test_cli import OTHER, Qhub, qhub, save_adapter  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
IDS = torch.arange(40).reshape(2, 20) * 7 % 300


@pytest.fixture
def base(tiny_base: BaseInfo) -> LoadedBase:
    """The tiny base in float32."""
    return load_base(tiny_base, dtype=torch.float32, device="cpu")


@pytest.fixture
def dora(base: LoadedBase, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A folder that PEFT saved with DoRA of random factors and lengths, and the logits it gives."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["q_proj", "down_proj"])
    model: Any = get_peft_model(base.model, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter *= 1 + 0.2 * torch.randn(parameter.shape, generator=generator)
            elif "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        logits = model(IDS).logits
    model.save_pretrained(tmp_path / "dora")
    model.unload()
    return tmp_path / "dora", logits


def logits_with(base: LoadedBase, folder: Path) -> torch.Tensor:
    """Of the base with an adapter by plain PEFT."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base.model, str(folder)).eval()
    with torch.no_grad():
        found = model(IDS).logits
    model.unload()
    return found


def test_weights_are_those_the_base_computes_with(base: LoadedBase) -> None:
    """Dequantised from the file one at a time, they are the loaded model's; what was not quantised comes as it is."""
    layers = {name: layer for name, layer in base.model.named_modules() if name.endswith(("q_proj", "down_proj"))}
    for name, weight, _ in dequantised(base.info, layers):
        with torch.no_grad():
            torch.testing.assert_close(weight, layers[name](torch.eye(weight.shape[1])).T)
    ((_, embedding, _),) = dequantised(base.info, ["model.embed_tokens"])
    torch.testing.assert_close(embedding, base.model.get_input_embeddings().weight)
    with pytest.raises(Incompatible, match=r"has no model\.nothing"):
        list(dequantised(base.info, ["model.nothing"]))


def test_at_full_rank_nothing_is_lost(base: LoadedBase, dora: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """Plain PEFT with the converted adapter has the logits of PEFT's own DoRA."""
    folder, wanted = dora
    adapter, told = through_base(base.info, 64, tmp_path / "made")(folder, None)
    assert told is not None
    assert (told["rank"], told["relative_error"] < 1e-5) == (64, True)
    assert adapter.config.rank_pattern == {}
    found = logits_with(base, adapter.path.parent)
    plain = base.model(IDS).logits
    assert float((wanted - plain).abs().max()) > 0.1
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_the_loss_told_is_the_loss(base: LoadedBase, dora: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """Over dense matrices the error is the one told, and a larger rank loses less."""
    folder, _ = dora
    errors = []
    for rank in (4, 12):
        opener = through_base(base.info, rank, tmp_path / f"made{rank}")
        adapter, told = opener(folder, None)
        whole, _ = through_base(base.info, 64, tmp_path / f"whole{rank}")(folder, None)
        lost = total = 0.0
        for (_, near), (_, true) in zip(adapter.deltas(), whole.deltas(), strict=True):
            lost += float((near.dense().double() - true.dense().double()).square().sum())
            total += float(true.dense().double().square().sum())
        assert told is not None
        assert told["relative_error"] == pytest.approx((lost / total) ** 0.5, abs=1e-5)
        assert opener(folder, None)[0] is adapter
        errors.append(told["relative_error"])
    assert errors[1] < errors[0] < 1


def test_qhub_merge_converts_and_tells(qhub: Qhub, tiny_base: BaseInfo, dora: tuple[Path, Any], home: Home) -> None:  # noqa: F811
    """With --with-base the loss is in the report and the lineage, the original's digest too; without it, refused."""
    folder, _ = dora
    refused = qhub("merge", folder, "--weights", "1")
    assert (refused.code, "--with-base NAME" in refused.err) == (2, True)
    plain = save_adapter(folder.parent / "plain.safetensors", tiny_base.fingerprint)
    line = ("merge", folder, plain, "--weights", "1,0.5", "--with-base", "tiny")
    told = json.loads(qhub(*line, "--name", "both", "--json").out)
    (conversion,) = told["conversions"]
    assert (conversion["parent"], conversion["base"], conversion["rank"]) == ("dora", "tiny", 4)
    assert 0 < conversion["relative_error"] < 1
    parents = Registry(home).resolve("both").lineage["parents"]
    assert parents[0]["converted"]["relative_error"] == conversion["relative_error"]
    assert "converted" not in parents[1]
    again = qhub(*line, "--dora-rank", "8", "--dry-run")
    assert "dora through tiny, rank 8, relative error" in again.out
    assert list(home.tmp.iterdir()) == []
    idle = qhub("merge", plain, "--weights", "1", "--with-base", "tiny", "--dry-run")
    assert (idle.code, "was not needed" in idle.err) == (0, True)


def test_what_cannot_be_converted_is_refused(qhub: Qhub, dora: tuple[Path, Any], tmp_path: Path) -> None:  # noqa: F811
    """Another base, no such base, lengths that do not fit or are NaN, DoRA in other verbs: one line, exit code 2."""
    from safetensors.torch import load_file, save_file

    folder, _ = dora
    cases = []
    for number, (change, told) in enumerate(
        [
            (lambda name, tensor: tensor[:-1] if "magnitude" in name else tensor, "does not fit the factors"),
            (lambda name, tensor: tensor * float("nan") if "magnitude" in name else tensor, "NaN or infinity"),
            (lambda name, tensor: tensor, "not for base 'tiny'"),
        ]
    ):
        bad = tmp_path / f"bad{number}"
        bad.mkdir()
        (bad / CONFIG).write_bytes((folder / CONFIG).read_bytes())
        tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(tensors, bad / WEIGHTS, metadata={"base_fingerprint": OTHER} if number == 2 else None)
        cases.append((bad, "tiny", told))
    for path, name, told in [*cases, (folder, "none", "there is no base 'none'")]:
        done = qhub("merge", path, "--weights", "1", "--with-base", name, "--dry-run")
        assert (done.code, told in done.err) == (2, True), done.err
    assert qhub("merge", folder, "--weights", "1", "--dora-rank", "3").code == 2


def test_qhub_add_keeps_dora(qhub: Qhub, tiny_base: BaseInfo, dora: tuple[Path, Any], home: Home) -> None:  # noqa: F811
    """A DoRA folder becomes a version with the same factors and lengths; what takes deltas still refuses it."""
    folder, _ = dora
    assert qhub("add", folder, "--name", "x", "--base", "tiny").code == 0
    version = Registry(home).resolve("x")
    there, here = (open_adapter(path, dora=True) for path in (folder, version.path))
    assert version.lineage["adapter"]["dora"] is True
    assert here.config.use_dora
    for module, delta in there.deltas():
        assert torch.equal(here.magnitude(module), there.magnitude(module))
        assert torch.equal(here.delta(module).B, delta.B)
    assert qhub("merge", "x", "--weights", "1", "--dry-run").code == 2
