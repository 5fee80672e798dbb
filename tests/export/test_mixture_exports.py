"""Mixtures of experts leave as models that transformers loads; adapters of older names fit, and others are refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapterhub_local.base.add import add_base
from adapterhub_local.base.fit import fit
from adapterhub_local.base.mixtures import checkpoint_name
from adapterhub_local.base.source import open_source
from adapterhub_local.errors import BadFile, Incompatible
from adapterhub_local.export import divergence
from adapterhub_local.export.fused import write_fused
from adapterhub_local.export.gguf import write_gguf
from adapterhub_local.hub.usage import usage
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from serve.adapters.compatibility import check_modules
from tests.export.test_whole_exports import write_adapter_for
from tests.mixtures import MIXTURES, add_mixture, dequantised_model

IDS = torch.tensor([[5, 17, 200, 31, 7, 90, 2, 64]])


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("source", ["base", "source"])
@pytest.mark.parametrize("name", MIXTURES)
def test_fused_is_base_and_adapter(name: str, source: str, home: Home, tmp_path: Path) -> None:
    """An adapter on attention and experts fused into the 4-bit base, or the 16-bit model, is a model of the family.

    It passes its own check, has the names that checkpoints of the family have, and can be a base again.
    """
    base = add_mixture(name, home, tmp_path / "model")
    adapter = open_adapter(write_adapter_for(base, tmp_path / "adapter"))
    onto = open_source(tmp_path / "model") if source == "source" else None
    fused = write_fused(base, adapter, tmp_path / "fused", check=True, onto=onto)
    with safe_open(tmp_path / "fused" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        theirs = set(file.keys())

    assert fused.divergence is not None
    assert fused.divergence.mean < divergence.LIMIT / 2
    assert names == theirs
    assert add_base("again", tmp_path / "fused", home).architecture == base.architecture


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_fused_computes_what_peft_does(name: str, home: Home, tmp_path: Path) -> None:
    """transformers' model of the fused folder has the logits of PEFT on its model of the base, to 16 bits."""
    base = add_mixture(name, home, tmp_path / "model")
    folder = write_adapter_for(base, tmp_path / "adapter", "q_proj", "v_proj", strength=0.2)
    write_fused(base, open_adapter(folder), tmp_path / "fused")
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32).eval()
    plain = dequantised_model(base, tmp_path / "joined")
    before = logits(plain)
    wanted = logits(PeftModel.from_pretrained(plain, str(folder)).eval())

    assert (logits(fused) - wanted).norm() < 0.03 * wanted.norm()
    assert (before - wanted).norm() > 0.1 * wanted.norm()


def test_a_gguf_adapter_is_refused(home: Home, tmp_path: Path) -> None:
    """GGUF names a mixture's tensors in ways not known here, and says so."""
    base = add_mixture("qwen3-moe", home, tmp_path / "model")
    adapter = open_adapter(write_adapter_for(base, tmp_path / "adapter", "q_proj"))
    with pytest.raises(Incompatible, match="is of a family whose tensors GGUF names in ways not known here"):
        write_gguf(adapter, base, tmp_path / "a.gguf", name="a")


def test_names_of_before_transformers_5(home: Home, tmp_path: Path) -> None:
    """An adapter on Mixtral's experts as they were called, `block_sparse_moe`, is one on the base's layers."""
    base = add_mixture("mixtral", home, tmp_path / "model")
    folder = write_adapter_for(base, tmp_path / "adapter", "w1", "w2", "w3")
    path = folder / "adapter_model.safetensors"
    ours = open_adapter(folder)
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    renamed = {checkpoint_name(key, "mixtral"): tensor for key, tensor in load_file(path).items()}
    save_file(renamed, path, notes)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["w1", "w2", "w3"]}))
    theirs, _ = fit(open_adapter(folder), base)

    assert all(".block_sparse_moe." in key for key in renamed)
    assert theirs.shapes == ours.shapes


@pytest.mark.parametrize("router", ["model.layers.0.mlp.gate", "model.layers.1.block_sparse_moe.gate"])
def test_an_adapter_on_a_router(router: str, home: Home, tmp_path: Path) -> None:
    """An adapter that changes a router is refused as that, when it is added and when it is served."""
    base = add_mixture("mixtral", home, tmp_path / "model")
    folder = write_adapter_for(base, tmp_path / "adapter", "q_proj")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for factor, shape in (("A", (8, 64)), ("B", (4, 8))):
        tensors[f"base_model.model.{router}.lora_{factor}.weight"] = torch.randn(shape)
    save_file(tensors, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "gate"]}))
    adapter = open_adapter(folder)

    with pytest.raises(Incompatible, match=r"gate, a router of experts, which stays as base 'tiny' has it: train"):
        fit(adapter, base)
    shapes = {module: (shape.in_features, shape.out_features) for module, shape in adapter.shapes.items()}
    del shapes[router]
    with pytest.raises(Incompatible, match=r"gate \(a router of experts, which stays as it is\)"):
        check_modules(adapter, "a@1", base, shapes)


def test_an_adapter_on_joined_experts(home: Home, tmp_path: Path) -> None:
    """PEFT's `target_parameters` is refused with what it is and what to do instead."""
    base = add_mixture("qwen3-moe", home, tmp_path / "model")
    folder = write_adapter_for(base, tmp_path / "adapter", "q_proj")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        BadFile, match=r'the experts of a mixture in one tensor\. Trained here \(`target_modules = "mlp"`'
    ):
        open_adapter(folder)


def test_a_card_says_what_transformers_quantises(home: Home, tmp_path: Path) -> None:
    """The card's code for PEFT is over experts in 16 bits, which it says for mixtures alone."""
    base = add_mixture("qwen3-moe", home, tmp_path / "model")
    folder = write_adapter_for(base, tmp_path / "adapter", "q_proj")
    files = {each.name: each for each in folder.iterdir()}
    version = Registry(home).publish("a", files, {"base": base.lineage()})
    told = "(but for its experts, which transformers keeps in 16 bits)"

    assert told in usage(version, base.lineage(), "Qwen/a", "me/a", 16)
    assert told not in usage(version, {**base.lineage(), "architecture": "Qwen3ForCausalLM"}, "Qwen/a", "me/a", 16)
