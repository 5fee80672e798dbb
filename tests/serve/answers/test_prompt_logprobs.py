"""Log-probabilities of prompts: right under every adapter, whatever runs beside, in the forms that clients parse."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import LoadedBase, load_base
from adapterhub_local.registry import Registry
from serve.engine.build import build_engine
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams
from serve.engine.sampler import NotFinite
from serve.engine.score import ROWS, score
from serve.text.prompt import PromptReader
from tests.serve.conftest import Server

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps until noon."
NAMES = [None, "alpha", "beta", "gamma"]


@pytest.fixture(scope="module")
def expected(built_base: Path, loaded_base: LoadedBase, served_registry: Registry) -> dict[str | None, torch.Tensor]:
    """log_softmax of the logits (tokens, vocabulary) that PEFT gives for TEXT, for each name."""
    tokens = torch.tensor([loaded_base.tokenizer.encode(TEXT)])
    found = {}
    for name in NAMES:
        model = loaded_base.model
        if name:
            own = load_base(read_record(built_base), device="cpu").model
            model = PeftModel.from_pretrained(own, served_registry.resolve(name).path).eval()
        with torch.inference_mode():
            found[name] = torch.log_softmax(model(input_ids=tokens).logits[0].float(), -1)
    assert not torch.allclose(found["alpha"], found["beta"], atol=0.1), "or this shows nothing"
    return found


def own_logprobs(logprobs: torch.Tensor, tokens: Sequence[int]) -> list[float]:
    return [float(logprobs[place, token]) for place, token in enumerate(tokens[1:])]


def test_mixed_batch_equals_peft(
    built_base: Path, loaded_base: LoadedBase, served_registry: Registry, expected: dict[str | None, torch.Tensor]
) -> None:
    """Every token's log-probability, rank and alternatives are PEFT's to 1e-4: in chunks, in a mixed batch, beside
    requests that ask for none, and when all of the prompt is known from before."""
    tokens = tuple(loaded_base.tokenizer.encode(TEXT))
    engine = build_engine(
        load_base(read_record(built_base), device="cpu"), EngineOptions(max_rows=8, tokens_per_step=24)
    )
    engine.scheduler.max_scored = 11
    for is_known in (False, True):
        requests = []
        for name in NAMES:
            version = served_registry.resolve(name) if name else None
            for num_best, max_tokens in ((None, 6), (3, 2)):
                adapter = engine.pool.acquire(version).digest if version else None
                params = SamplingParams(max_tokens=max_tokens, temperature=0, prompt_logprobs=num_best)
                requests.append(Request(f"{name}-{num_best}", tokens, params, adapter))
        engine.submit(*requests)
        while engine.has_work:
            assert not any(output.error for output in engine.step())
        for request in requests:
            if request.params.prompt_logprobs is None:
                assert not request.scores
                assert request.num_cached > 0 or not is_known
                continue
            name = None if request.id.startswith("None") else request.id.partition("-")[0]
            wanted = expected[name]
            assert len(request.scores) > 1, "it came in chunks"
            ours = [logprob for part in request.scores for logprob in part.logprobs]
            assert ours == pytest.approx(own_logprobs(wanted, tokens), abs=1e-4), request.id
            ranks = [rank for part in request.scores for rank in part.ranks]
            places = [int((row > row[token]).sum()) + 1 for row, token in zip(wanted[:-1], tokens[1:], strict=True)]
            assert ranks == places
            best = [value for part in request.scores for value in part.values]
            assert best == pytest.approx(wanted[:-1].topk(3).values.flatten().tolist(), abs=1e-4)


@given(count=st.integers(1, 3 * ROWS), num_best=st.integers(0, 60), seed=st.integers(0, 9))
@settings(max_examples=25)
def test_score(count: int, num_best: int, seed: int) -> None:
    """Scores are those of log_softmax, however many rows there are, and no more alternatives than tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 50, generator=generator) * 4
    tokens = torch.randint(50, (count,), generator=generator).tolist()
    wanted = torch.log_softmax(logits, -1)
    found = score(logits, tokens, num_best)
    assert list(found.logprobs) == pytest.approx([float(row[token]) for row, token in zip(wanted, tokens, strict=True)])
    assert list(found.values) == pytest.approx(wanted.topk(min(num_best, 50)).values.flatten().tolist())
    assert len(found.tokens) == len(found.values) == count * found.num_best
    logits[count // 2, 7] = torch.nan
    with pytest.raises(NotFinite):
        score(logits, tokens, num_best)


def test_echo_as_the_harness_reads_it(server: Server, expected: dict[str | None, torch.Tensor]) -> None:
    """lm-evaluation-harness: token ids, one token asked for, the prompt's numbers are all but the last, for a batch."""
    tokens = server.service.base.tokenizer.encode(TEXT)
    prompts = [tokens, tokens[:9], tokens]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    for model in ("alpha", "beta"):
        choices = server.complete(model=model, **body).json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        for prompt, choice in zip(prompts, choices, strict=True):
            logprobs = choice["logprobs"]
            assert {len(each) for each in logprobs.values()} == {len(prompt) + 1}
            assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
            wanted = own_logprobs(expected[model], prompt)
            assert logprobs["token_logprobs"][1:-1] == pytest.approx(wanted, abs=1e-4)
            rows = expected[model][: len(prompt) - 1]
            best = [max(top.values()) for top in logprobs["top_logprobs"][1:-1]]
            assert best == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)
            is_best = [own == top for own, top in zip(logprobs["token_logprobs"][1:-1], best, strict=True)]
            assert is_best == (rows.argmax(-1) == torch.tensor(prompt[1:])).tolist()


def test_the_end_token_is_counted(server: Server) -> None:
    """A token that ends the answer has its log-probability, too: who drops the last one drops that."""
    end = server.service.base.tokenizer.eos_token_id
    ask = {"model": "alpha", "prompt": TEXT, "max_tokens": 1, "logprobs": 1, "logit_bias": {str(end): 100}}
    choice = server.complete(**ask, echo=True).json()["choices"][0]
    num_tokens = len(server.service.base.tokenizer.encode(TEXT))
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "stop")
    assert len(choice["logprobs"]["tokens"]) == num_tokens + 1
    assert choice["logprobs"]["text_offset"][-1] == len(TEXT)


def test_nothing_but_the_prompt(server: Server) -> None:
    """max_tokens 0 gives back the prompt and its numbers, and is no answer; alone it is refused."""
    whole = server.complete(model="alpha", prompt=TEXT, max_tokens=0, logprobs=2, echo=True).json()
    choice = whole["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert len(choice["logprobs"]["tokens"]) == whole["usage"]["prompt_tokens"] == whole["usage"]["total_tokens"]
    one = server.complete(model="alpha", prompt=TEXT, max_tokens=1, logprobs=2, echo=True).json()["choices"][0]
    assert choice["logprobs"]["token_logprobs"] == one["logprobs"]["token_logprobs"][:-1]
    assert server.complete(model="alpha", prompt=TEXT, max_tokens=0, echo=True).json()["choices"][0]["text"] == TEXT
    assert server.complete(model="alpha", prompt=[5], max_tokens=0, prompt_logprobs=1).json()["choices"][0][
        "prompt_logprobs"
    ] == [None]
    longest = [7] * server.service.engine.max_length
    assert server.complete(model="alpha", prompt=longest, max_tokens=0, echo=True).status_code == 200
    assert server.complete(model="alpha", prompt=TEXT, max_tokens=0).json()["error"]["param"] == "max_tokens"


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_streams(server: Server, logprobs: int | None, max_tokens: int) -> None:
    """A stream's pieces, put together, are the whole answer: text, log-probabilities and offsets, for every choice."""
    ask = {"model": "gamma", "prompt": [TEXT, "Größe 🙂!"], "n": 2, "max_tokens": max_tokens, "echo": True}
    ask |= {"logprobs": logprobs, "ignore_eos": True}
    whole = server.complete(**ask).json()["choices"]
    assert [choice["text"].startswith(ask["prompt"][choice["index"] // 2]) for choice in whole] == [True] * 4
    texts, lists = [""] * 4, [{} for _ in range(4)]
    with server.http.stream("POST", "/v1/completions", json={"temperature": 0, "stream": True, **ask}) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                texts[choice["index"]] += choice["text"]
                for name, values in (choice["logprobs"] or {}).items():
                    lists[choice["index"]].setdefault(name, []).extend(values)
    assert texts == [choice["text"] for choice in whole]
    for own, choice in zip(lists, whole, strict=True):
        if logprobs is None:
            assert choice["logprobs"] is None
            continue
        known = choice["logprobs"]
        for name in ("tokens", "text_offset"):
            assert own[name] == known[name]
        assert own["token_logprobs"][1:] == pytest.approx(known["token_logprobs"][1:], abs=1e-4)
        for token, top in zip(known["tokens"][1:], known["top_logprobs"][1:], strict=True):
            assert token in top
            assert len(top) <= logprobs + 1


def test_prompt_logprobs_as_vllm(server: Server, expected: dict[str | None, torch.Tensor]) -> None:
    """`prompt_logprobs` is by token id, with ranks, beside the choice of a completion and the choices of a chat."""
    tokens = server.service.base.tokenizer.encode(TEXT)
    choice = server.complete(model="beta", prompt=tokens, max_tokens=2, prompt_logprobs=2).json()["choices"][0]
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"][0] is None
    own = [entry[str(token)] for token, entry in zip(tokens[1:], choice["prompt_logprobs"][1:], strict=True)]
    assert [one["logprob"] for one in own] == pytest.approx(own_logprobs(expected["beta"], tokens), abs=1e-4)
    assert "".join(one["decoded_token"] for one in own) == TEXT[len(server.service.base.tokenizer.decode(tokens[:1])) :]
    for token, entry in zip(tokens[1:], choice["prompt_logprobs"][1:], strict=True):
        ranks = {key: value["rank"] for key, value in entry.items()}
        assert set(ranks.values()) == {1, 2, ranks[str(token)]}
    messages = [{"role": "user", "content": "Hi"}]
    chat = {"model": "beta", "messages": messages, "max_tokens": 1, "prompt_logprobs": 0}
    body = server.http.post("/v1/chat/completions", json=chat).json()
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]
    refused = server.http.post("/v1/chat/completions", json={**chat, "stream": True}).json()
    assert refused["error"]["param"] == "prompt_logprobs"


def test_too_many_numbers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one answer may hold is refused before anything is computed, with what to do."""
    monkeypatch.setattr("serve.read.MAX_NUMBERS", 31 * 200 * 21)
    prompts = [[7] * 200] * 32
    before = server.wait_until_idle()["num_steps"]
    error = server.complete(model="alpha", prompt=prompts, echo=True, logprobs=20, max_tokens=1).json()["error"]
    assert error["param"] == "logprobs"
    assert "fewer prompts" in error["message"]
    assert server.wait_until_idle()["num_steps"] == before
    ask = {"model": "alpha", "prompt": prompts[1:], "echo": True, "max_tokens": 0}
    assert server.complete(**ask, logprobs=20).status_code == 200
    assert server.complete(model="alpha", prompt="a", echo=True, logprobs=21).status_code == 400


@given(text=st.text(alphabet="ab Gß🙂é\n.", min_size=1, max_size=30), by_tokens=st.booleans())
@settings(max_examples=60)
def test_offsets(loaded_base: LoadedBase, text: str, by_tokens: bool) -> None:
    """Offsets rise from 0, and between two of them stands the token's text, if it is of whole characters."""
    reader = PromptReader(loaded_base.tokenizer, len(loaded_base.tokenizer))
    tokens = reader.plain(text)
    if by_tokens:
        tokens = (*tokens, loaded_base.tokenizer.eos_token_id, *tokens)
        text = reader.text(tokens)
    offsets = [*reader.offsets(text, tokens), len(text)]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    for token, (start, end) in zip(tokens, pairwise(offsets), strict=True):
        piece = reader.spelling(token)
        assert "\ufffd" in piece or text[start:end] == piece


def test_offsets_of_what_was_added(loaded_base: LoadedBase) -> None:
    """A token that the tokenizer puts before the text has no width in it."""
    reader = PromptReader(loaded_base.tokenizer, len(loaded_base.tokenizer))
    end = loaded_base.tokenizer.eos_token_id
    tokens = reader.plain("Größe 🙂")
    assert reader.offsets("Größe 🙂", (end, *tokens)) == [0, *reader.offsets("Größe 🙂", tokens)]
