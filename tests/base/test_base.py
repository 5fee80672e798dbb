"""The base: quantised once, loaded by transformers itself, never changed by use."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo, find_base, list_bases, remove_base
from adapterhub_local.base.load import choose_device, close_packing_trap, import_bitsandbytes, load_base
from adapterhub_local.errors import BadFile, BadReference, Corrupt, InputError, InUse, NotFound
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.tiny import llama_config, save_tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The logits of a plain forward in evaluation mode, on whatever path the model takes."""
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_equals_quantising_on_the_fly(tiny_base: BaseInfo, tiny_folder: Path) -> None:
    """Our file gives the logits that transformers gives when it quantises the 16-bit model while loading it."""
    import_bitsandbytes()
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=config, dtype=torch.bfloat16)
    close_packing_trap(theirs, torch.bfloat16)

    assert torch.equal(logits(load_base(tiny_base, dtype=torch.bfloat16).model), logits(theirs))


def test_transformers_loads_the_folder_itself(tiny_base: BaseInfo) -> None:
    """`AutoModelForCausalLM.from_pretrained` needs nothing but the folder, and finds 4-bit layers in it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base.folder, dtype=torch.float32).train()

    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(model.lm_head).__name__ == "Linear"


def test_use_does_not_change_the_base(tiny_base: BaseInfo) -> None:
    """Evaluation forwards leave every stored tensor bit for bit as it was (the CPU packing trap is closed)."""
    model = load_base(tiny_base).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = logits(model)
    model.train()
    model.eval()
    second = logits(model)
    after = model.state_dict()

    assert torch.equal(first, second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_layer_with_odd_shapes_runs(home: Home, tmp_path: Path) -> None:
    """Shapes that bitsandbytes' CPU packing cannot divide are no problem, since nothing is packed."""
    folder = save_tiny_model(
        tmp_path / "odd", hidden_size=72, intermediate_size=104, num_attention_heads=4, head_dim=18
    )

    assert torch.isfinite(logits(load_base(add_base("odd", folder, home)).model)).all()


def test_nothing_is_trainable(tiny_base: BaseInfo) -> None:
    """A loaded base has no parameter that gradients could reach."""
    assert not any(parameter.requires_grad for parameter in load_base(tiny_base).model.parameters())


def test_bits(tiny_base: BaseInfo) -> None:
    """A weight takes 4 bits plus 8/64 for its block plus 32/(64 * 256) for the block of blocks, but for rounding up."""
    assert tiny_base.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.01)


def test_fingerprint(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """The same model gives the same fingerprint; another weight, template or setting gives another."""
    same = add_base("same", save_tiny_model(tmp_path / "same"), home)
    weight = add_base("weight", save_tiny_model(tmp_path / "weight", seed=1), home)
    template = add_base("template", save_tiny_model(tmp_path / "template", chat_template="{{ messages }}"), home)
    setting = add_base("setting", save_tiny_model(tmp_path / "setting", rms_norm_eps=1e-3), home)

    assert same.fingerprint == tiny_base.fingerprint
    assert len({base.fingerprint for base in (same, weight, template, setting)}) == 4


def test_fingerprint_knows_no_files(tiny_base: BaseInfo, home: Home, tmp_path: Path, tiny_folder: Path) -> None:
    """How a checkpoint is cut into shards does not change the fingerprint."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    for file in tiny_folder.glob("*token*"):
        shutil.copy(file, tmp_path / "sharded")
    shutil.copy(tiny_folder / "chat_template.jinja", tmp_path / "sharded")

    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert add_base("sharded", tmp_path / "sharded", home).fingerprint == tiny_base.fingerprint


def test_tied_and_untied_heads(home: Home, tmp_path: Path) -> None:
    """A tied output head is stored once, an untied one stays in 16 bits."""
    tied = add_base("tied", save_tiny_model(tmp_path / "tied", tie_word_embeddings=True), home)
    untied = add_base("untied", save_tiny_model(tmp_path / "untied", tie_word_embeddings=False), home)
    model = load_base(tied).model

    assert untied.num_parameters - tied.num_parameters == llama_config().vocab_size * llama_config().hidden_size
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_names(home: Home, tiny_folder: Path, tiny_base: BaseInfo) -> None:
    """A taken name, a namespace and a name that is a path are refused before anything is read."""
    with pytest.raises(InUse, match="exists already"):
        add_base("tiny", tiny_folder, home)
    for name in ("a/b", "../up", "Big"):
        with pytest.raises(BadReference):
            add_base(name, tiny_folder, home)


def test_unknown_base_suggests(home: Home, tiny_base: BaseInfo) -> None:
    """A base that does not exist is an error with the nearest name."""
    with pytest.raises(NotFound, match="did you mean tiny"):
        find_base("tinny", home)


def set_config(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def strip_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99), "not a safetensors file"),
        (strip_tensor, "no model.norm.weight"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "pickled",
        ),
        (lambda folder: set_config(folder, quantization_config={"quant_method": "gptq"}), "quantised already"),
        (lambda folder: set_config(folder, intermediate_size=192), "has shape"),
    ],
)  # fmt: skip
def test_bad_sources(home: Home, tmp_path: Path, tiny_folder: Path, damage, message: str) -> None:
    """A source that is damaged, pickled, quantised or not what its config says is refused; nothing is left behind."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    damage(folder)
    with pytest.raises(BadFile, match=message):
        add_base("bad", folder, home)

    assert list_bases(home) == []
    assert not list(home.tmp.iterdir())


def test_not_a_gguf_file(home: Home, tmp_path: Path) -> None:
    """A file that is not a GGUF is an error, not a traceback."""
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(BadFile, match="is not a GGUF file: give"):
        add_base("bad", tmp_path / "text.gguf", home)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(BadFile):
        add_base("bad", tmp_path / "model.gguf", home)
    with pytest.raises(NotFound):
        add_base("bad", tmp_path / "none.gguf", home)


def test_remove(home: Home, tiny_base: BaseInfo) -> None:
    """A base that an adapter needs is kept unless forced; one that nobody needs goes."""
    Registry(home).publish("needy", {"a.json": b"{}"}, {"base": tiny_base.lineage()})
    with pytest.raises(InUse, match="needy@1"):
        remove_base("tiny", home)
    assert find_base("tiny", home) == tiny_base

    remove_base("tiny", home, force=True)
    assert list_bases(home) == []
    assert not tiny_base.folder.exists()


def test_a_damaged_record(home: Home, tiny_base: BaseInfo) -> None:
    """A base whose record or weights cannot be read says so and how to repair it."""
    (tiny_base.folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(Corrupt, match="cannot be loaded"):
        load_base(tiny_base)
    (tiny_base.folder / "qhub-base.json").write_text("{}")
    with pytest.raises(Corrupt, match="add it again"):
        find_base("tiny", home)


def test_a_gpu_that_is_not_there() -> None:
    """Asking for a GPU where there is none is an error, not a silent fall back."""
    if torch.cuda.is_available():
        assert choose_device() == "cuda"
        return
    assert choose_device() == "cpu"
    with pytest.raises(InputError, match="GPU"):
        choose_device("cuda")


def test_importing_bitsandbytes_loads_no_compiler() -> None:
    """torch's compiler, seconds of every start, is loaded when a compiled function is first called, and works then;
    nothing that training imports brings it with bitsandbytes by another way."""
    code = """
import sys, torch
own = torch.compile
import adapterhub_local.train.objectives.grpo, adapterhub_local.train.train
from adapterhub_local.base.load import import_bitsandbytes
assert torch.compile is own
assert import_bitsandbytes() is sys.modules["bitsandbytes"]
assert not any(name.startswith("torch._inductor.compile_fx") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
