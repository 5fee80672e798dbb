"""Mixtures of experts as bases: experts are in NF4 one by one, and compute what transformers' own model computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig

from adapterhub_local.base.add import add_base
from adapterhub_local.base.experts import Experts
from adapterhub_local.base.load import import_bitsandbytes, load_base
from adapterhub_local.base.mixtures import ARCHITECTURES, FAMILIES, Family, checkpoint_name
from adapterhub_local.base.modules import check_targets, linear_modules
from adapterhub_local.errors import BadFile, InputError
from adapterhub_local.settings import Home
from tests.architectures import SHAPES, save_architecture
from tests.mixtures import MIXTURES, add_mixture, dequantised_model
from tests.tiny import VOCABULARY, byte_tokenizer

IDS = torch.tensor([[5, 17, 200, 31, 7, 90, 2, 64], [1, 1, 1, 44, 44, 44, 9, 8]])


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_every_family_is_tested() -> None:
    """Each family that can be a base is among the tiny models of the tests."""
    assert {SHAPES[name][0].model_type for name in MIXTURES} == FAMILIES.keys()


@pytest.mark.parametrize("name", MIXTURES)
def test_logits_are_those_of_transformers(name: str, home: Home, tmp_path: Path) -> None:
    """The loaded base computes what transformers' joined experts compute with its dequantised weights."""
    info = add_mixture(name, home, tmp_path / "model")
    model = load_base(info).model

    assert torch.allclose(logits(model), logits(dequantised_model(info, tmp_path / "joined")), rtol=1e-5, atol=1e-5)
    assert type(model).__name__ == info.architecture
    assert info.architecture in ARCHITECTURES


@pytest.mark.parametrize("changes", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}])
def test_layers_without_experts(changes: dict, home: Home, tmp_path: Path) -> None:
    """Where only some layers have experts, the others are plain, and the logits transformers'."""
    info = add_base("tiny", save_architecture("qwen3-moe", tmp_path / "model", **changes), home)
    model = load_base(info).model
    kinds = [type(layer.mlp).__name__ for layer in model.model.layers]

    assert kinds == ["Qwen3MoeMLP", "Qwen3MoeSparseMoeBlock"]
    assert torch.allclose(logits(model), logits(dequantised_model(info, tmp_path / "joined")), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_in_four_bits(name: str, home: Home, tmp_path: Path) -> None:
    """Every matrix of every expert is in NF4 in the file and in memory, and routers are in 16 bits in the file."""
    info = add_mixture(name, home, tmp_path / "model")
    model = load_base(info).model
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    linear = [module for each in layers for module in each.modules() if isinstance(module, nn.Linear)]
    four_bits = import_bitsandbytes().nn.Linear4bit
    with safe_open(info.folder / "model.safetensors", framework="pt") as file:
        routers = [file.get_tensor(key) for key in file.keys() if key.endswith("mlp.gate.weight")]  # noqa: SIM118

    assert len(layers) == len(routers) == (1 if name == "qwen3-moe-partly" else 2)
    assert len(linear) == len(layers) * 3 * len(layers[0])
    assert all(isinstance(module, four_bits) for module in linear)
    assert len([module for module in linear_modules(info) if ".experts." in module]) == len(linear)
    assert {router.dtype for router in routers} == {torch.bfloat16}
    assert info.bits_per_weight < 4.3


def test_the_fingerprint_covers_experts(home: Home, tmp_path: Path) -> None:
    """A base of which one expert of one layer differs is another base."""
    folder = save_architecture("qwen3-moe", tmp_path / "model")
    before = add_base("one", folder, home)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.3.down_proj.weight"][0] *= -1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    assert add_base("other", folder, home).fingerprint != before.fingerprint


@pytest.mark.parametrize("name", MIXTURES)
def test_other_forms_of_a_checkpoint(name: str, home: Home, tmp_path: Path) -> None:
    """Experts joined as transformers 5 has them, and experts in NF4 already, become the very same base."""
    folder = save_architecture(name, tmp_path / "model")
    info = add_base("tiny", folder, home)
    joined = shutil.copytree(folder, tmp_path / "joined")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    save_file(model.state_dict(), joined / "model.safetensors", {"format": "pt"})
    four = shutil.copytree(info.folder, tmp_path / "nf4")
    kind = SHAPES[name][0].model_type
    tensors = {checkpoint_name(key, kind): tensor for key, tensor in load_file(four / "model.safetensors").items()}
    save_file(tensors, four / "model.safetensors", {"format": "pt"})

    assert any(tensor.dim() == 3 for tensor in model.state_dict().values())
    assert add_base("joined", joined, home).fingerprint == info.fingerprint
    assert add_base("nf4", four, home).fingerprint == info.fingerprint


@pytest.mark.parametrize("lacking", ["model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.0.mlp.gate.weight"])
def test_a_part_that_is_missing(home: Home, tmp_path: Path, lacking: str) -> None:
    """A checkpoint without a matrix of one expert, or without a router, is refused by that name."""
    folder = save_architecture("qwen3-moe", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[lacking]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(BadFile, match=f"it has no {lacking}"):
        add_base("tiny", folder, home)
    assert not home.bases.exists() or not list(home.bases.iterdir())


def test_more_experts_than_tensors(home: Home, tmp_path: Path) -> None:
    """A config of many more experts than the checkpoint has tensors is refused before a model is made of it."""
    folder = save_architecture("qwen3-moe", tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "num_experts": 30_000}))
    with pytest.raises(BadFile, match="30,000 experts"):
        add_base("tiny", folder, home)


@pytest.mark.parametrize(("name", "chosen"), [("qwen3-moe", 9), ("mixtral", 0)])
def test_more_experts_for_a_token_than_there_are(home: Home, tmp_path: Path, name: str, chosen: int) -> None:
    """A config that routes each token to no expert, or to more than the layers have, is refused with both numbers."""
    folder = save_architecture(name, tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "num_experts_per_tok": chosen}))
    with pytest.raises(BadFile, match=rf"each token to {chosen} experts \(num_experts_per_tok\), of \d there are"):
        add_base("tiny", folder, home)
    assert not home.bases.exists() or not list(home.bases.iterdir())


def test_a_family_that_is_not_supported(home: Home, tmp_path: Path) -> None:
    """A mixture of another family is refused as what it is, with the families that there are."""
    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, pad_token_id=256,
        eos_token_id=258,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "oss")
    byte_tokenizer().save_pretrained(tmp_path / "oss")
    message = r"is a mixture of 4 experts of a family \(gpt_oss\) that is not supported\. Supported are mixtral, "
    with pytest.raises(BadFile, match=message):
        add_base("tiny", tmp_path / "oss", home)


def test_a_router_is_no_target(home: Home, tmp_path: Path) -> None:
    """A recipe that names the router as a target is refused: it routes tokens and is not trained."""
    info = add_mixture("qwen3-moe", home, tmp_path / "model")
    check_targets(info, ("q_proj", "gate_proj"))
    with pytest.raises(InputError, match="'gate' routes tokens to the experts of base 'tiny' and is not trained"):
        check_targets(info, ("q_proj", "gate"))


def test_experts_by_hand() -> None:
    """Each token gets the weighted sum of its own experts, whatever the order; experts without tokens do nothing."""
    torch.manual_seed(0)
    experts = Experts(5, 8, 6, nn.SiLU(), Family("Any"))
    states, weights = torch.randn(7, 8), torch.rand(7, 2)
    chosen = torch.tensor([[4, 0], [0, 4], [2, 0], [0, 2], [4, 2], [2, 4], [0, 4]])  # never 1 and 3
    met: list[tuple[int, list[int]]] = []
    plain = experts.visit

    def visit(number: int, tokens: torch.Tensor):
        met.append((number, tokens.tolist()))
        return plain(number, tokens)

    experts.visit = visit
    given = states.clone().requires_grad_()
    out = experts(given, chosen, weights)
    wanted = torch.stack([
        sum(weights[token, place] * experts[int(chosen[token, place])](states[token]) for place in range(2))
        for token in range(7)
    ])  # fmt: skip
    out.sum().backward()

    assert torch.allclose(out, wanted, atol=1e-6)
    assert met == [(0, [0, 1, 2, 3, 6]), (2, [2, 3, 4, 5]), (4, [0, 1, 4, 5, 6])]
    assert given.grad is not None
    assert given.grad.abs().sum(-1).min() > 0
