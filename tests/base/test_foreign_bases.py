"""Bases that people have: 4-bit folders as they are, the text part of models that also see, FP8."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.functional import get_4bit_type
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import read_record
from adapterhub_local.base.held import dense
from adapterhub_local.base.load import close_packing_trap, load_base
from adapterhub_local.base.quantisation import KINDS, OURS, Quantisation
from adapterhub_local.base.weights import BaseWeights
from adapterhub_local.errors import BadFile
from adapterhub_local.plan.shape import read_config
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.train.train import train
from serve.engine.build import build_engine
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams
from serve.kernels import reference
from serve.lora.weights import plain_absmax
from tests.chats import write_recipe
from tests.tiny import VOCABULARY, byte_tokenizer

IDS = torch.tensor([[5, 17, 200, 31, 7, 90, 2, 64]])


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def save_4_bits(source: Path, folder: Path, kind: Quantisation = OURS, **settings) -> Path:
    """The model at `source` as transformers saves it in 4 bits."""
    given = {key: value for key, value in kind.config([], "bfloat16").items() if key.startswith("bnb_4bit")}
    config = BitsAndBytesConfig(load_in_4bit=True, **{**given, **settings})
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_4_bit_folder_is_taken_as_it_is(kind: Quantisation, tiny_folder: Path, home: Home, tmp_path: Path) -> None:
    """Its tensors become the base, byte for byte, and its logits are transformers'; training on it works."""
    folder = save_4_bits(tiny_folder, tmp_path / "held", kind)
    info = add_base("tiny", folder, home, hub_id="unsloth/tiny-bnb-4bit")
    theirs, ours = load_file(folder / "model.safetensors"), load_file(info.folder / "model.safetensors")
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    close_packing_trap(wanted, torch.float32)
    for parameter in wanted.parameters():
        parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data

    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(load_base(info).model), logits(wanted))
    assert (info.fingerprint == add_base("again", tiny_folder, home).fingerprint) == (kind is OURS)
    assert read_record(info.folder).kind is kind
    assert train(load_recipe(write_recipe(tmp_path)), home).lineage["base"]["fingerprint"] == info.fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bnb_4bit_quant_storage": torch.bfloat16}, "with storage other than uint8: only NF4 or FP4 in bytes"),
        ({"llm_int8_skip_modules": ["lm_head", "down_proj"]}, "is in 16 bits beside others in NF4"),
    ],
)
def test_other_forms_of_4_bits(tiny_folder: Path, home: Home, tmp_path: Path, settings: dict, message: str) -> None:
    """4-bit folders that are not what a base holds are refused with what they are, and nothing is left behind."""
    folder = save_4_bits(tiny_folder, tmp_path / "other", **settings)
    with pytest.raises(BadFile, match=message):
        add_base("tiny", folder, home)
    assert not home.bases.exists() or not list(home.bases.iterdir())


def test_an_nf4_weight_that_does_not_fit(tiny_folder: Path, home: Home, tmp_path: Path) -> None:
    """Constants of another length than the weight's are refused by name."""
    folder = save_4_bits(tiny_folder, tmp_path / "nf4")
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("q_proj.weight.absmax"))
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadFile, match=r"q_proj\.weight is stored as nf4"):
        add_base("tiny", folder, home)


@pytest.mark.parametrize("is_double", [True, False])
def test_constants_that_the_config_does_not_know(is_double: bool, tiny_folder, home: Home, tmp_path: Path) -> None:
    """A config that says of double quantisation what is not so is refused by the name of the setting or the tensor."""
    folder = save_4_bits(tiny_folder, tmp_path / "nf4", bnb_4bit_use_double_quant=is_double)
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"]["bnb_4bit_use_double_quant"] = not is_double
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFile, match="bnb_4bit_use_double_quant" if is_double else "in NF4 and has no nested_absmax"):
        add_base("tiny", folder, home)


def test_a_table_of_other_values(tiny_folder: Path, home: Home, tmp_path: Path) -> None:
    """A folder whose 16 values are not its kind's is refused: bitsandbytes would read another W than our kernels."""
    folder = save_4_bits(tiny_folder, tmp_path / "nf4")
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("q_proj.weight.quant_map"))
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadFile, match=r"its 4 bits do not stand for the values of NF4 \(quant_map\)"):
        add_base("tiny", folder, home)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_kind_says_what_bitsandbytes_does(kind: Quantisation, tiny_folder: Path, home: Home, tmp_path: Path) -> None:
    """Its values are bitsandbytes', its bits are the file's, and W is bitsandbytes' in memory, from the file, and by
    the kernels' reference; a plan counts the same bits."""
    info = add_base("tiny", save_4_bits(tiny_folder, tmp_path / "held", kind), home)
    assert torch.allclose(torch.tensor(kind.table), get_4bit_type(kind.codes, device="cpu"), rtol=0, atol=1e-7)
    assert info.bits_per_weight == pytest.approx(kind.bits, rel=0.02)  # small weights begin a group of absmax each
    assert read_config(info.folder).quantisation is kind

    weight = load_base(info).model.model.layers[1].mlp.down_proj.weight
    wanted = functional.dequantize_4bit(weight.data, weight.quant_state).float()
    state = weight.quant_state
    by_table = reference.multiply(
        torch.eye(wanted.shape[1]), weight.data, plain_absmax(state), state.code.float(), len(wanted)
    ).T
    assert torch.equal(dense(weight, weight.quant_state.dtype).float(), wanted)
    assert torch.allclose(BaseWeights(info).of("model.layers.1.mlp.down_proj")[0], by_table, rtol=1e-6, atol=1e-9)
    assert torch.equal(dense(weight, torch.float32), by_table)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_kind_is_served(kind: Quantisation, tiny_folder: Path, home: Home, tmp_path: Path) -> None:
    """The engine's greedy tokens, by the kernels that read its 4 bits, are those of transformers over the same base."""
    base = load_base(add_base("tiny", save_4_bits(tiny_folder, tmp_path / "held", kind), home), device="cpu")
    wanted = base.model.generate(IDS, max_new_tokens=12, do_sample=False)[0, IDS.shape[1] :].tolist()
    engine = build_engine(base, EngineOptions(base_exec="nf4"))
    request = Request("one", tuple(IDS[0].tolist()), SamplingParams(max_tokens=12, temperature=0))
    engine.submit(request)
    while engine.has_work:
        engine.step()

    assert request.output[: len(wanted)] == wanted
    kernels = engine.snapshot().kernels
    assert ("step" in kernels) == ("multiply" in kernels)  # both where there is a C compiler


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("layers.0.self_attn.q_proj.weight", float("nan")),
        ("layers.1.mlp.down_proj.weight", float("-inf")),
        ("embed_tokens.weight", float("inf")),
        ("norm.weight", float("nan")),
        ("layers.0.mlp.up_proj.weight", 3.4e38),  # a number in float32, none in bfloat16
        ("q_proj.weight.nested_absmax", float("nan")),
    ],
)
def test_a_weight_that_is_no_number(part: str, value: float, tiny_folder: Path, home: Home, tmp_path: Path) -> None:
    """A checkpoint whose answers would be no numbers is refused by the name of the tensor, in 4 bits or 16."""
    folder = tmp_path / "model"
    if "absmax" in part:
        save_4_bits(tiny_folder, folder)
    else:
        shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith(part))
    tensors[name] = tensors[name].float()
    tensors[name].flatten()[-1] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadFile, match=rf"{re.escape(name)} has NaN or infinity in it"):
        add_base("tiny", folder, home)
    assert not (home.bases / "tiny").exists()


def save_vision(folder: Path, old_names: bool = False) -> Gemma3ForConditionalGeneration:
    """A tiny Gemma 3 that also sees; its tensors called as checkpoints of before transformers 4.52 have them."""
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={
                "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
                "sliding_window": 64, "eos_token_id": byte_tokenizer().eos_token_id,
            },
            vision_config={
                "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
                "image_size": 28, "patch_size": 14,
            },
            mm_tokens_per_image=1,
        )
    ).to(torch.bfloat16)  # fmt: skip
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {name.replace("model.language_model.", "language_model.model."): tensor.clone()
               for name, tensor in load_file(path).items()}  # fmt: skip
    if old_names:
        save_file(tensors, path, {"format": "pt"})
    return model.eval()


@pytest.mark.parametrize("old_names", [False, True])
def test_the_text_part_of_a_model_that_sees(home: Home, tmp_path: Path, old_names: bool) -> None:
    """The tower is left out; what the text part then computes is what the whole model does, and it can be trained."""
    whole = save_vision(tmp_path / "vision", old_names)
    info = add_base("tiny", tmp_path / "vision", home)
    base = load_base(info, dtype=torch.float32)
    whole = whole.float()
    layers = {name: module for name, module in base.model.named_modules() if type(module).__name__ == "Linear4bit"}
    for name, module in layers.items():  # the whole model with the weights that the base has
        theirs = whole.get_submodule(name.replace("model.", "model.language_model.", 1))
        theirs.weight.data = dense(module.weight, torch.float32)

    assert info.architecture == "Gemma3ForCausalLM"
    assert len(layers) == 14
    assert {part.removeprefix("model.") for part in info.left_out} == {"multi_modal_projector", "vision_tower"}
    assert torch.allclose(logits(whole), logits(base.model), rtol=1e-4, atol=1e-4)
    version = train(load_recipe(write_recipe(tmp_path)), home)
    assert Registry(home).resolve(str(version)).content_digest == version.content_digest


def test_fp8_in_blocks(tiny_folder: Path, home: Home, tmp_path: Path) -> None:
    """A checkpoint in FP8 with a scale a block is the base of the 16-bit model that it stands for."""
    torch.manual_seed(0)
    for name in ("fp8", "plain"):
        shutil.copytree(tiny_folder, tmp_path / name)
    tensors, plain = load_file(tmp_path / "fp8" / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        plain[name] = weight
        if name.endswith("proj.weight"):
            rows, columns = (-(-size // 32) for size in weight.shape)
            scales = torch.rand(rows, columns) + 0.5
            spread = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)[: weight.shape[0], : weight.shape[1]]
            tensors[name] = (weight.float() / spread).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
            plain[name] = (tensors[name].float() * spread).to(torch.bfloat16)
    save_file(tensors, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    path = tmp_path / "fp8" / "config.json"
    method = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": method}))

    found = add_base("eight", tmp_path / "fp8", home)
    assert found.fingerprint == add_base("sixteen", tmp_path / "plain", home).fingerprint
