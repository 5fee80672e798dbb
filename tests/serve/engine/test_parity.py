"""Every row of a mixed batch gives what plain PEFT gives for its adapter alone on the same NF4 base."""

import pytest
import torch
from peft import PeftModel

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import LoadedBase, load_base
from adapterhub_local.registry import Registry
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams, TokenOutput

NUM_TOKENS = 24
PROMPTS = ["Hello", "The quick brown fox jumps over the lazy dog", "a", "1 + 1 ="]


@pytest.fixture(scope="module")
def engine(built_base) -> Engine:
    """An engine with few rows and a small budget, so that requests wait and prompts come in chunks."""
    options = EngineOptions(max_rows=6, tokens_per_step=16, max_adapters=3)
    return build_engine(load_base(read_record(built_base), device="cpu"), options)


def run(engine: Engine, requests: list[Request]) -> dict[str, list[TokenOutput]]:
    """All outputs of each request."""
    engine.submit(*requests)
    outputs: dict[str, list[TokenOutput]] = {request.id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            outputs[output.request_id].append(output)
    return outputs


def peft_answer(model, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, each from a whole forward pass without a cache."""
    tokens, logprobs = list(prompt), []
    for _ in range(NUM_TOKENS):
        with torch.inference_mode():
            row = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0, -1].float(), -1)
        tokens.append(int(row.argmax()))
        logprobs.append(float(row.max()))
    return tokens[len(prompt) :], logprobs


def test_mixed_batch_equals_peft_alone(
    engine: Engine, built_base, loaded_base: LoadedBase, served_registry: Registry
) -> None:
    """Greedy tokens are the same, all of them, and log-probabilities within 1e-4, in float32."""
    names = [None, "alpha", "beta", "gamma"]
    versions = {name: served_registry.resolve(name) for name in names if name}
    requests, answers = [], {}
    prompts = [loaded_base.tokenizer.encode(prompt) for prompt in PROMPTS]
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, logprobs=0)
    for name in names:
        base = load_base(read_record(built_base), device="cpu") if name else loaded_base
        model = PeftModel.from_pretrained(base.model, versions[name].path).eval() if name else base.model
        for index, prompt in enumerate(prompts):
            adapter = engine.pool.acquire(versions[name]).digest if name else None
            request = Request(f"{name}-{index}", tuple(prompt), params, adapter)
            requests.append(request)
            answers[request.id] = peft_answer(model, prompt)

    requests.sort(key=lambda request: request.id[-1])  # neighbours in the queue have different adapters

    outputs = run(engine, requests)

    for request in requests:
        tokens, logprobs = answers[request.id]
        assert request.output == tokens, request.id
        ours = [output.sampled.logprob for output in outputs[request.id] if output.sampled]
        assert ours == pytest.approx(logprobs, abs=1e-4), request.id
    assert engine.stats.max_adapters == 3
    assert engine.stats.max_rows == 6
    distinct = {tuple(answers[f"{name}-0"][0]) for name in names}
    assert len(distinct) == len(names), "the adapters must differ, or this test shows nothing"
