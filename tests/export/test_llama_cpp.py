"""llama.cpp itself reads what we write: its greedy tokens are ours, for every family, fused or with the adapter beside.

Optional: `pip install 'adapterhub-local[llama-cpp]'`; `make check-llama-cpp` installs it and runs this.
"""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.base.shapes import linear_shapes, tied_weights
from adapterhub_local.export.families import FAMILIES
from adapterhub_local.export.gguf import write_gguf
from adapterhub_local.export.gguf_model import write_gguf_model
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.settings import Home
from tests.architectures import SHAPES, save_architecture
from tests.export.llama_cpp import greedy, log_probabilities, serve
from tests.serve.adapter_makers import write_random
from tests.tiny import VOCABULARY, byte_tokenizer

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'adapterhub-local[llama-cpp]'")

PROMPT = [7, 11, 13, 17, 19, 23, 29, 31] * 4  # longer than the windows of Gemma's tiny models
TOKENS = 12
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4 + [1.5] * 4,
        "long_factor": [2.0] * 4 + [4.0] * 4, "original_max_position_embeddings": 256}  # fmt: skip
GEMMA = {"query_pre_attn_scalar": 16}
GEMMA3 = {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0},
          "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}  # fmt: skip
# name -> architecture of tests/architectures.py, changes of its config
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                                                 "original_max_position_embeddings": 128}}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3", {**GEMMA, "num_hidden_layers": 7}),
    "gemma3-linear": ("gemma3", {**GEMMA, "num_hidden_layers": 7, "rope_parameters": GEMMA3}),
    "phi3": ("phi3", {}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 256}),
    "phi3-partial": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                  "partial_rotary_factor": 0.75}}),
    "falcon": ("falcon", {}),
    "falcon-new": ("falcon-new", {}),
    "falcon-11b": ("falcon-new", {"num_ln_in_parallel_attn": 1}),
    "gpt-neox": ("gpt-neox", {}),
    "gpt-neox-serial": ("gpt-neox", {"use_parallel_residual": False}),
}  # fmt: skip


def make_base(name: str, folder: Path, home: Home) -> BaseInfo:
    """A tiny random base whose vectors (norms, biases) are random too, so that none can be left out unseen."""
    kind, changes = MODELS[name]
    save_architecture(kind, folder)
    config = AutoConfig.from_pretrained(folder)
    settings = {**config.to_dict(), **changes}
    settings.pop("layer_types", None)  # as many as there are layers
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(type(config)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    model.to(torch.bfloat16).save_pretrained(folder)
    return add_base("tiny", folder, home)


def make_adapter(base: BaseInfo, folder: Path, *, head: bool = False) -> Path:
    """A random adapter of all linear layers, with rsLoRA and another alpha in one of them."""
    tied = tied_weights(base)
    shapes = {name: (columns, rows) for name, (rows, columns) in linear_shapes(base).items()
              if head or f"{name}.weight" not in tied}  # fmt: skip
    folder.mkdir()
    modules = sorted({name.rpartition(".")[2] for name in shapes})
    write_random(folder, shapes, seed=3, modules=modules, use_rslora=True, alpha_pattern={modules[0]: 3.0})
    return folder


def ours(base: BaseInfo, adapter: Path) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """PEFT over the NF4 base: greedy tokens, the first one's log-probabilities, and the same without the adapter."""
    loaded = load_base(base, dtype=torch.float32, device="cpu").model
    ids, first = list(PROMPT), torch.empty(0)
    with torch.inference_mode():
        plain = torch.log_softmax(loaded(input_ids=torch.tensor([ids])).logits[0, -1], -1)
        model = PeftModel.from_pretrained(loaded, str(adapter)).eval()
        for step in range(TOKENS):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            first = torch.log_softmax(logits, -1) if step == 0 else first
            ids.append(int(logits.argmax()))
            if ids[-1] == byte_tokenizer().eos_token_id:
                break
    return ids[len(PROMPT) :], first, plain


def test_every_family_is_here() -> None:
    """No family that is exported goes without llama.cpp's own answer."""
    assert {SHAPES[kind][0].model_type for kind, _ in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_answers_as_we_do(home: Home, tmp_path: Path, name: str) -> None:
    """Base and adapter as one GGUF, and as an adapter over the base's, give the tokens of PEFT over the NF4 base."""
    base = make_base(name, tmp_path / "model", home)
    folder = make_adapter(base, tmp_path / "adapter")
    adapter = open_adapter(folder)
    write_gguf_model(base, None, tmp_path / "base.gguf", name="base", kind="f32")
    write_gguf_model(base, adapter, tmp_path / "fused.gguf", name="a@1", kind="f32")
    write_gguf(adapter, base, tmp_path / "adapter.gguf", name="a@1")
    tokens, wanted, plain = ours(base, folder)

    for model, beside in (("fused.gguf", None), ("base.gguf", tmp_path / "adapter.gguf")):
        server = serve(tmp_path / model, beside)
        assert greedy(server, PROMPT, TOKENS)[: len(tokens)] == tokens, model
        found = log_probabilities(server, PROMPT, VOCABULARY)
        # its table of GELU has 16 bits
        bound = 0.05 if SHAPES[MODELS[name][0]][0].model_type in ("falcon", "gpt_neox") else 0.01
        assert all(abs(float(wanted[token]) - value) < bound for token, value in found.items() if value > -15)
    assert float((plain - wanted).abs().max()) > 0.5


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_each_type_of_weights_is_near(home: Home, tmp_path: Path, name: str, kind: str) -> None:
    """In 16 and 8 bits llama.cpp's first token is ours, an adapted head that was tied included, and files shrink."""
    base = make_base(name, tmp_path / "model", home)
    folder = make_adapter(base, tmp_path / "adapter", head=True)
    adapter = open_adapter(folder)
    sizes = {
        which: write_gguf_model(base, adapter, tmp_path / f"{which}.gguf", name="a@1", kind=which).size
        for which in ("f32", kind)
    }
    tokens, wanted, _ = ours(base, folder)

    server = serve(tmp_path / f"{kind}.gguf")
    assert greedy(server, PROMPT, 1) == tokens[:1]
    found = log_probabilities(server, PROMPT, VOCABULARY)
    assert sum(float(wanted[token].exp()) * (float(wanted[token]) - value) for token, value in found.items()) < 0.05
    assert sizes[kind] < 0.7 * sizes["f32"]
