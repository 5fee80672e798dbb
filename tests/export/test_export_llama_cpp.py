"""llama.cpp itself reads our GGUF adapters: its logits are those of PEFT, for every architecture we write.

Optional: `pip install xllamacpp` (llama.cpp as a package; no compiler is needed).
"""

from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from adapterhub_local.base.add import add_base
from adapterhub_local.base.load import load_base
from adapterhub_local.base.shapes import linear_shapes
from adapterhub_local.export.gguf import write_gguf
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.settings import Home
from tests.gguf_model import write_gguf_model
from tests.serve.adapter_makers import LINEARS, write_random
from tests.tiny import byte_tokenizer, llama_config, save_tiny_model

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")

PROMPT = [7, 11, 13, 17, 19, 23, 29, 31]
VOCABULARY = 256 + 64


def save_model(kind: str, folder: Path) -> Path:
    """A tiny 16-bit model of one architecture."""
    if kind == "llama":
        return save_tiny_model(folder)
    config, model = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    settings = {key: value for key, value in llama_config().to_dict().items() if key in vars(config()) and key not in
                ("model_type", "architectures", "transformers_version", "layer_types", "head_dim")}  # fmt: skip
    torch.manual_seed(0)
    extra = {"head_dim": 16} if kind == "qwen3" else {}
    model(config(**settings, **extra)).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def llama_cpp_log_probabilities(model: Path, adapter: Path | None, prompt: list[int]) -> tuple[int, dict[int, float]]:
    """The next token of llama.cpp and its log-probabilities of the whole vocabulary."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.n_batch = 256, 1, 64
    params.cpuparams.n_threads = 1
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    ask = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "n_probs": VOCABULARY, "cache_prompt": False}
    answer = httpx.post(f"{server.listening_address}/completion", json=ask, timeout=30, trust_env=False).json()
    found = answer["completion_probabilities"][0]
    return found["id"], {entry["id"]: entry["logprob"] for entry in found["top_logprobs"]}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_gives_pefts_logits(home: Home, tmp_path: Path, kind: str) -> None:
    """With rsLoRA and other ranks and alphas in some modules, which its format does not know, llama.cpp agrees."""
    base = add_base("tiny", save_model(kind, tmp_path / "model"), home)
    shapes = {module: (columns, rows) for module, (rows, columns) in linear_shapes(base).items() if module != "lm_head"}
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"rank": 8, "use_rslora": True, "alpha_pattern": {"q_proj": 3.0, "down_proj": 20.0}}
    write_random(folder, shapes, seed=3, modules=LINEARS, **settings)
    write_gguf_model(base, tmp_path / "model.gguf")
    rank = write_gguf(open_adapter(folder), base, tmp_path / "adapter.gguf", name="test")

    token, ours = llama_cpp_log_probabilities(tmp_path / "model.gguf", tmp_path / "adapter.gguf", PROMPT)
    loaded = load_base(base, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        plain = torch.log_softmax(loaded.model(input_ids=torch.tensor([PROMPT])).logits[0, -1], -1)
        model = PeftModel.from_pretrained(loaded.model, str(folder)).eval()
        theirs = torch.log_softmax(model(input_ids=torch.tensor([PROMPT])).logits[0, -1], -1)
    both = torch.tensor([ours[index] for index in range(len(theirs))])

    assert rank == 8
    assert token == int(theirs.argmax())
    assert float((both - theirs).abs().max()) < 1e-3
    assert float((plain - theirs).abs().max()) > 0.5
