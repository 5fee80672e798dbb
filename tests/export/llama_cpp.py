"""llama.cpp itself, for tests: a server over a GGUF model, with an adapter or without, and what it answers."""

from pathlib import Path
from typing import Any

import httpx

_CLIENT = httpx.Client(timeout=120, trust_env=False, verify=False)  # plain HTTP on this machine; one for all is faster


def serve(model: Path, adapter: Path | None = None, *, context: int = 256) -> Any:
    """llama.cpp's server on one thread, computing attention in float32; raises RuntimeError for a file it refuses."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.n_batch = context, 1, 64
    params.cpuparams.n_threads = 1
    params.warmup, params.verbosity = False, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


def post(server: Any, path: str, body: dict[str, Any]) -> Any:
    """What one request is answered with."""
    return _CLIENT.post(f"{server.listening_address}{path}", json=body).json()


def greedy(server: Any, prompt: list[int], count: int) -> list[int]:
    """The most probable tokens, one after another; the last may be one that ends a text."""
    ask = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "cache_prompt": False, "return_tokens": True}
    return post(server, "/completion", ask)["tokens"]


def log_probabilities(server: Any, prompt: list[int], size: int) -> dict[int, float]:
    """The first token's log-probabilities over the whole vocabulary; empty if it is half a letter."""
    ask = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "n_probs": size, "cache_prompt": False}
    found = post(server, "/completion", ask).get("completion_probabilities", [])
    return {entry["id"]: entry["logprob"] for entry in found[0]["top_logprobs"]} if found else {}


def tokenise(server: Any, text: str) -> list[int]:
    """A text's tokens, special ones read as such, with those that begin and end every text."""
    return post(server, "/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
