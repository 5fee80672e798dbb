"""A packed batch gives what each sequence gives alone, for every architecture that the check at load lets through."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from adapterhub_local.base.attention import own_attention
from adapterhub_local.base.bases import read_record
from adapterhub_local.base.experts import build_model
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import Incompatible, InputError
from serve.engine.attention import NAME
from serve.engine.build import build_engine
from serve.engine.cache import KVCache
from serve.engine.options import EngineOptions
from serve.engine.packed import PackedBatch, Row
from serve.engine.pages import pages_for
from serve.engine.request import Request, SamplingParams, Scheduled
from serve.engine.runner import Runner
from serve.engine.self_check import use_packed_attention
from serve.lora.linear import LoraContext

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
FALCON = {"ffn_hidden_size": 96, **{name: size for name, size in SIZES.items() if name != "intermediate_size"}}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, sliding_window=5, query_pre_attn_scalar=16, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "phi3": Phi3Config(**SIZES, num_key_value_heads=2, sliding_window=5, pad_token_id=0),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "falcon": FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-7b": FalconConfig(**FALCON, multi_query=True),
    "falcon-rw": FalconConfig(**FALCON, multi_query=False, alibi=True, parallel_attn=False, bias=True),
    "opt": OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, word_embed_proj_dim=64
    ),
}


def make_model(config):
    """A random model whose attention matters: with the usual small weights every softmax would be flat."""
    torch.manual_seed(0)
    config = deepcopy(config)
    config.initializer_range = 0.3
    # transformers 5.23 adds Falcon's ALiBi twice in its eager attention
    config._attn_implementation = "sdpa" if config.model_type == "falcon" else "eager"
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def plain_logits(model, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_plain(name: str) -> None:
    """Chunks, single tokens, pages in any order, beyond the sliding window: the logits are those of each alone."""
    model = make_model(CONFIGS[name])
    generator = torch.Generator().manual_seed(1)
    sequences = {
        row: torch.randint(128, (length,), generator=generator).tolist() for row, length in ((0, 19), (3, 9), (2, 14))
    }
    pages = {0: [7, 2], 3: [5], 2: [1, 3]}  # the last of them is never reached

    expected = {row: plain_logits(model, tokens) for row, tokens in sequences.items()}
    use_packed_attention(model)
    runner = Runner(model, KVCache(8), LoraContext())
    requests = {
        row: Request(str(row), tuple(tokens), SamplingParams(max_tokens=1), pages=pages[row])
        for row, tokens in sequences.items()
    }
    steps = [  # (row, start, number of tokens)
        [(0, 0, 7)],
        [(3, 0, 1), (0, 7, 6)],
        [(0, 13, 1), (3, 1, 4), (2, 0, 12)],
        [(0, 14, 1), (3, 5, 1), (2, 12, 1)],
        [(3, 6, 1)],
        [(2, 13, 1), (0, 15, 4), (3, 7, 2)],
    ]
    for step in steps:
        items = [Scheduled(requests[row], start, count) for row, start, count in step]
        logits = runner.forward(items, {})
        wanting = [item for item in items if item.wants_token]
        assert len(logits) == len(wanting)
        for item, result in zip(wanting, logits, strict=True):
            wanted = expected[int(item.request.id)][-1]
            torch.testing.assert_close(result, wanted, atol=2e-4 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_copied", [0, 4])
def test_every_answer_token_equals_plain(name: str, max_copied: int) -> None:
    """Fed one token at a time, each step's logits are those of the sequence so far, be its copy kept or not."""
    model = make_model(CONFIGS[name])
    tokens = torch.randint(128, (36,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = plain_logits(model, tokens)
    use_packed_attention(model)
    runner = Runner(model, KVCache(3, max_copied), LoraContext())
    request = Request("r", tuple(tokens[:4]), SamplingParams(max_tokens=99), pages=[2, 1, 3])
    got = [runner.forward([Scheduled(request, 0, 4)], {})[0]]
    for position in range(4, 36):
        request.output.append(tokens[position])
        got.append(runner.forward([Scheduled(request, position, 1)], {})[0])
    torch.testing.assert_close(torch.stack(got), expected[3:], atol=2e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=128), "attention interface"),
        (Llama4TextConfig(**GROUPED, num_local_experts=2, attention_chunk_size=8, intermediate_size_mlp=96), "chunked"),
    ],
    ids=["bloom", "llama4"],
)
def test_refused_architectures(config, reason: str) -> None:
    """What would be silently wrong is refused with the reason, and the model is left as it was."""
    model = make_model(config)
    before = plain_logits(model, [1, 2, 3])
    with pytest.raises(Incompatible, match=f"cannot be served.*{reason}"):
        use_packed_attention(model)
    assert model.config._attn_implementation != NAME
    assert torch.equal(plain_logits(model, [1, 2, 3]), before)


def test_rows_of_all_lengths() -> None:
    """One long row beside many short ones is read by itself, and the answers are those of each alone."""
    model = make_model(CONFIGS["gemma2"])
    generator = torch.Generator().manual_seed(3)
    lengths = [30, 700, 5, 17, 250, 33]
    sequences = [torch.randint(128, (length,), generator=generator).tolist() for length in lengths]
    expected = [plain_logits(model, tokens)[-1] for tokens in sequences]
    use_packed_attention(model)
    runner = Runner(model, KVCache(100), LoraContext())
    numbers = iter(torch.randperm(100, generator=generator).tolist())
    requests = [
        Request(
            str(row), tuple(tokens), SamplingParams(1), pages=[1 + next(numbers) for _ in range(pages_for(len(tokens)))]
        )
        for row, tokens in enumerate(sequences)
    ]
    for request in requests:
        runner.forward([Scheduled(request, 0, request.num_tokens - 1)], {})
    got = runner.forward([Scheduled(request, request.num_tokens - 1, 1) for request in requests], {})
    for logits, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(logits, wanted, atol=2e-4 * float(wanted.abs().max()), rtol=0)


def test_groups_of_like_length() -> None:
    """Rows are read with others of like length: no group reads far more places than its rows have."""
    lengths = [4000, *[100] * 15, 130, 90, 1000, 900, 700]
    rows = [
        Row(place, place + 1, length - 1, tuple(range(1, pages_for(length) + 1)))
        for place, length in enumerate(lengths)
    ]
    positions = torch.tensor([length - 1 for length in lengths])
    answers = PackedBatch(KVCache(1), rows, positions).decode_groups
    assert sorted(place for _, tokens in answers for place in tokens.tolist()) == list(range(len(lengths)))
    found = [[row.num_places for row in group.rows] for group, _ in answers]
    assert found == [[4000], [1000, 900], [700], [130, *[100] * 8], [*[100] * 7, 90]]


def test_pages_survive_growth_of_the_cache() -> None:
    """A cache that grows keeps what is in it, and page 0 stays zero."""
    cache = KVCache(1000)
    cache.reserve(2)
    keys = torch.randn(4, 2, 8)
    before, _ = cache.write(0, torch.tensor([1, 2]), torch.tensor([3, 15]), keys, keys)
    cache.reserve(300)
    held, _ = cache.write(0, torch.tensor([299]), torch.tensor([0]), keys[:, :1], keys[:, :1])
    assert len(before) < 300 <= len(held) <= 1001
    assert torch.equal(held[1, :, 3], keys[:, 0])
    assert torch.equal(held[2, :, 15], keys[:, 1])
    assert not held[0].any()
    cache.clear([2, 999])  # one of them was never made
    assert not held[2].any()
    assert held[1].any()


def test_no_request_turns_the_positions_of_others(built_base) -> None:
    """Where one long request would change the rotary embeddings of a whole batch, none may be as long."""
    turns = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}
    lengths = {"max_position_embeddings": 512, "original_max_position_embeddings": 64}
    config = Phi3Config(**SIZES, **lengths, num_key_value_heads=2, pad_token_id=0, rope_parameters=turns)
    base = replace(load_base(read_record(built_base), device="cpu"), model=make_model(config))
    with pytest.raises(InputError, match=r"max_length is 65, .*longrope.* more than 64 tokens"):
        build_engine(base, EngineOptions(max_length=65))
    assert build_engine(base).max_length == 64


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_cap_their_scores_keep_the_cap(name: str) -> None:
    """They alone are built with plain attention: torch's own has no cap, and transformers 5.17 would choose it."""
    wanted = {"attn_implementation": "eager"} if name == "gemma2" else {}
    assert own_attention(CONFIGS[name]) == wanted
    model = build_model(deepcopy(CONFIGS[name]))
    if wanted:
        assert model.config._attn_implementation == "eager"
