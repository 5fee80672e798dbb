"""Every architecture that is served: rows of a mixed batch on its NF4 base equal plain PEFT for each adapter alone."""

from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.experts import build_model
from adapterhub_local.base.load import LoadedBase, close_packing_trap, import_bitsandbytes
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from serve.engine.build import build_engine
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams
from tests.tiny import VOCABULARY, byte_tokenizer

NUM_TOKENS = 12
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "bos_token_id": None,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # so that attention matters
    "tie_word_embeddings": False,
}
SIZES = {**COMMON, "intermediate_size": 128}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
ROUTED = {"num_experts_per_tok": 2}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, sliding_window=5, query_pre_attn_scalar=16, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "phi3": Phi3Config(**SIZES, num_key_value_heads=2, sliding_window=5),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "falcon": FalconConfig(**COMMON, ffn_hidden_size=128, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": FalconConfig(
        **COMMON, ffn_hidden_size=128, multi_query=False, alibi=True, parallel_attn=False, bias=True
    ),
    "qwen3_moe": Qwen3MoeConfig(**GROUPED, **ROUTED, num_experts=6, moe_intermediate_size=64, norm_topk_prob=True),
    "mixtral": MixtralConfig(**SIZES, **ROUTED, num_key_value_heads=2, num_local_experts=4, sliding_window=5),
    "olmoe": OlmoeConfig(**SIZES, **ROUTED, num_key_value_heads=2, num_experts=4),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES,
        **ROUTED,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
    ),
}


def nf4_base(config, name: str, folder: Path) -> LoadedBase:
    """A random model in float32 whose linear layers, but for the output head, are NF4 with double quantisation."""
    nn = import_bitsandbytes().nn
    torch.manual_seed(0)
    # a copy: an engine writes its attention into the config of the model that it serves
    model = build_model(deepcopy(config), dtype=torch.float32).eval().requires_grad_(False)
    head = model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    for path, linear in linears.items():
        settings = {"compress_statistics": True, "quant_type": "nf4"}
        new = nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, torch.float32, **settings)
        new.weight = nn.Params4bit(linear.weight.data, requires_grad=False, **settings)
        new.bias = linear.bias
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, new.to("cpu"))
    close_packing_trap(model, torch.float32)
    model.is_loaded_in_4bit = True  # PEFT asks
    digest = "sha256:" + "0" * 64
    info = BaseInfo(name, digest, name, 1, 1, 4.1, 4.1, 1, 128, False, "", None, None, "2026-01-01", folder)
    return LoadedBase(info, model.eval(), byte_tokenizer())


def adapted(model, seed: int, rank: int, targets: str | list[str] = "all-linear", **settings) -> PeftModel:
    """The model with a random adapter, on every linear layer but the output head by default, made by PEFT itself."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **settings)
    peft = get_peft_model(model, config).eval()
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2 / rank)
        elif "lora_magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
        elif "trainable_tokens_delta" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return peft


def answer_alone(model, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens and log-probabilities, each from a whole forward pass without a cache."""
    tokens, logprobs = list(prompt), []
    for _ in range(NUM_TOKENS):
        with torch.inference_mode():
            row = torch.log_softmax(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float(), -1)
        tokens.append(int(row.argmax()))
        logprobs.append(float(row.max()))
    return tokens[len(prompt) :], logprobs


@pytest.mark.parametrize("name", CONFIGS)
def test_mixed_batch_equals_peft(name: str, home: Home, tmp_path: Path) -> None:
    """Greedy tokens are the same, and log-probabilities within 1e-4, in float32: base, LoRA, DoRA, rows of tokens."""
    config = CONFIGS[name]
    lineage = {"base": nf4_base(config, name, tmp_path).info.lineage()}
    prompts = [list(range(3, 12)), [7], [40, 3, 9, 120, 33]]
    expected = {}
    registry = Registry(home)
    dora = {"use_dora": True, "use_rslora": True}  # of a rank that a plain adapter has, too
    tokens = {"trainable_token_indices": [120, 7, 9, 33]}
    for index, (rank, settings) in enumerate([(None, {}), (2, {}), (5, {}), (5, dora), (5, tokens)]):
        model = nf4_base(config, name, tmp_path).model
        if rank is not None:
            model = adapted(model, index, rank, **settings)
            model.save_pretrained(tmp_path / f"a{index}")
            files = {each.name: each for each in (tmp_path / f"a{index}").iterdir() if each.name.startswith("adapter_")}
            registry.publish(f"a{index}", files, lineage)
        for which, prompt in enumerate(prompts):
            expected[index, which] = answer_alone(model, prompt)
    engine = build_engine(
        nf4_base(config, name, tmp_path), EngineOptions(max_rows=8, tokens_per_step=11, base_exec="nf4", max_length=64)
    )
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, logprobs=0)
    requests = {
        key: Request(
            str(key),
            tuple(prompts[key[1]]),
            params,
            engine.pool.acquire(registry.resolve(f"a{key[0]}")).digest if key[0] else None,
        )
        for key in sorted(expected, key=lambda key: key[1])
    }
    engine.submit(*requests.values())
    logprobs: dict[str, list[float]] = {request.id: [] for request in requests.values()}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            logprobs[output.request_id].append(output.sampled.logprob)

    for key, request in requests.items():
        tokens, values = expected[key]
        assert request.output == tokens, key
        assert logprobs[request.id] == pytest.approx(values, abs=1e-4), key
    first = sorted(expected[index, 0][1][0] for index in range(5))
    assert min(after - before for before, after in pairwise(first)) > 1e-3, (
        "all five must differ, or this shows nothing"
    )
