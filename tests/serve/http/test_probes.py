"""Embeddings and scores of given answers: PEFT's numbers, for any adapter and pooling, prefixes computed once."""

import base64
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import LoadedBase, load_base
from adapterhub_local.registry import Registry
from serve.requests.messages import Message
from tests.serve.conftest import Server

TEXTS = ["Hello", "A longer text, in which the states of many tokens lie.", "x"]
USER = {"role": "user", "content": "Hello"}
NAMES = ["tiny", "alpha"]


@pytest.fixture(scope="module")
def models(built_base: Path, loaded_base: LoadedBase, served_registry: Registry) -> dict[str, torch.nn.Module]:
    """The base, and the same under an adapter as PEFT computes it."""
    own = load_base(read_record(built_base), device="cpu").model
    return {"tiny": loaded_base.model, "alpha": PeftModel.from_pretrained(own, served_registry.resolve("alpha").path)}


@torch.inference_mode()
def states(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """The last hidden states (tokens, hidden size)."""
    return model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0].float()


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_embeddings_are_the_models_states(server: Server, models: dict, pooling: str) -> None:
    """Vectors equal what transformers and PEFT give, of texts and ids, many at once and again from what is known."""
    encode = server.service.base.tokenizer.encode
    for name in NAMES:
        for _ in range(2):
            ask = {"model": name, "input": TEXTS, "extra_body": {"pooling": pooling, "normalize": False}}
            found = server.client.embeddings.create(**ask)  # the client asks for base64
            for text, item in zip(TEXTS, found.data, strict=True):
                own = states(models[name], encode(text))
                expected = {"last": own[-1], "mean": own.mean(dim=0), "cls": own[0]}[pooling]
                assert np.allclose(item.embedding, expected.numpy(), atol=2e-4), (name, text)
        ids = server.http.post("/v1/embeddings", json={"model": name, "input": encode(TEXTS[1]), "pooling": pooling})
        (vector,) = [item["embedding"] for item in ids.json()["data"]]
        own = np.asarray(found.data[1].embedding)
        assert math.isclose(sum(each * each for each in vector), 1, rel_tol=1e-5), "of length 1 unless asked otherwise"
        assert np.allclose(vector, own / np.linalg.norm(own), atol=1e-5)
        assert ids.json()["usage"]["prompt_tokens"] == len(encode(TEXTS[1]))


def test_forms_of_vectors(server: Server) -> None:
    """base64 holds the same float32 numbers; the model's own number of dimensions may be said, another is refused."""
    body = {"model": "alpha", "input": "Hello"}
    plain = server.http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    packed = server.http.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"][0][
        "embedding"
    ]
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == plain
    assert server.http.post("/v1/embeddings", json={**body, "dimensions": len(plain)}).status_code == 200
    for change, param in (
        ({"dimensions": len(plain) - 1}, "dimensions"),
        ({"pooling": "max"}, "pooling"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": "x" * 600}, "input"),
        ({"temprature": 1}, "temprature"),
        ({"model": "nothing"}, "model"),
    ):
        response = server.http.post("/v1/embeddings", json={**body, **change})
        assert response.status_code in (400, 404), change
        assert response.json()["error"]["param"] == param, response.text


@torch.inference_mode()
def likelihood(model: torch.nn.Module, before: list[int], answer: list[int]) -> float:
    """The log-probability of an answer's tokens behind others."""
    logits = model(input_ids=torch.tensor([before + answer])).logits[0].float()
    logprobs = torch.log_softmax(logits, -1)[len(before) - 1 : -1]
    return float(logprobs[range(len(answer)), answer].sum())


def test_scores_are_likelihoods(server: Server, models: dict) -> None:
    """Each answer's score is PEFT's, behind a text and as a chat's answer; the prefix is computed once for all."""
    choices = ["positive", "negative", "neither of them"]
    tokenizer, prompt = server.service.base.tokenizer, "Say whether this is positive or negative: fine. It is "
    chat = list(server.service.reader.prompts.chat([Message(**USER)]))
    for name in NAMES:
        for asked, before in (({"prompt": prompt}, tokenizer.encode(prompt)), ({"messages": [USER]}, chat)):
            body = {"model": name, **asked, "choices": choices, "cache_salt": f"{name}{len(before)}"}
            response = server.http.post("/v1/score", json=body)
            assert response.status_code == 200, response.text
            data = response.json()["data"]
            expected = [likelihood(models[name], before, tokenizer.encode(choice)) for choice in choices]
            assert np.allclose([item["logprob"] for item in data], expected, atol=1e-3)
            assert [len(item["token_logprobs"]) for item in data] == [len(tokenizer.encode(c)) for c in choices]
            assert math.isclose(sum(item["probability"] for item in data), 1, rel_tol=1e-9)
            assert response.json()["best"] == choices[int(np.argmax(expected))]
            cached = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached == (len(choices) - 1) * ((len(before) - 1) // 16) * 16, "of the others all whole pages"


def test_scores_that_cannot_be(server: Server) -> None:
    """What is missing, contrary or too much is refused; an answer behind nothing is scored from its second token on."""
    body = {"model": "alpha", "choices": ["a", "b"]}
    for change, param in (
        ({}, "prompt"),
        ({"prompt": "x", "messages": [USER]}, "prompt"),
        ({"prompt": "x", "choices": []}, "choices"),
        ({"prompt": "x", "choices": ["x"] * 40}, None),
        ({"messages": [USER], "choices": ["x" * 600]}, "messages"),
    ):
        response = server.http.post("/v1/score", json={**body, **change})
        assert response.status_code in (400, 429), change
        assert response.json()["error"]["param"] == param, response.text
    data = server.http.post("/v1/score", json={**body, "prompt": "", "choices": ["ab"]}).json()["data"]
    assert len(data[0]["token_logprobs"]) == 1
