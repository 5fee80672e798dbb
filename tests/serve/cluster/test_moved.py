"""A begun stream whose replica is lost goes on at another one: its client sees nothing of it, or an error."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from serve.cluster.call import Call
from serve.cluster.relay import Relay
from serve.requests.begun import Begun
from tests.serve.cluster.conftest import Gateway
from tests.serve.cluster.test_gateway import STREAMS, USER

SEED = "5eed" * 8
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["one", "two and more", "three"]}}}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
LONG: Mapping[str, Any] = {"messages": [USER], "max_tokens": 7, "ignore_eos": True}
KINDS: dict[str, tuple[str, Mapping[str, Any]]] = {
    **{path: (path, body) for path, body in STREAMS.items()},
    "drawn": (CHAT, {**LONG, "temperature": 1.3}),
    "drawn, seeded": (CHAT, {**LONG, "temperature": 1.3, "seed": 7}),
    "several": (CHAT, {**LONG, "temperature": 1.0, "n": 3}),
    "several prompts": (COMPLETION, {"prompt": ["Hi", "A b", "C"], "n": 2, "max_tokens": 4}),
    "of several lengths": (COMPLETION, {"prompt": ["Hi", "A"], "max_tokens": 9, "temperature": 2.0, "seed": 3}),
    "scored": (CHAT, {**LONG, "logprobs": True, "top_logprobs": 3}),
    "scored completion": (COMPLETION, {"prompt": "Hi", "max_tokens": 5, "logprobs": 2}),
    "scored response": (
        "/v1/responses",
        {"input": "Hi", "max_output_tokens": 6, "top_logprobs": 2, "include": ["message.output_text.logprobs"]},
    ),
    "penalised": (CHAT, {**LONG, "frequency_penalty": 1.5, "repetition_penalty": 1.4, "temperature": 0.8}),
    "in a form": (CHAT, {"messages": [USER], "max_tokens": 30, "response_format": FORM}),
    "that calls": (CHAT, {"messages": [USER], "max_tokens": 40, "tools": [TOOL], "tool_choice": "required"}),
    "that calls twice": (
        CHAT,
        {"messages": [USER], "max_tokens": 40, "tools": [TOOL], "tool_choice": "required", "n": 2},
    ),
    "response that calls": (
        "/v1/responses",
        {"input": "Hi", "tools": [{"type": "function", **TOOL["function"]}], "tool_choice": "required"},
    ),
    "message that calls": (
        "/v1/messages",
        {
            "messages": [USER],
            "max_tokens": 40,
            "tools": [{"name": "look", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "any"},
        },
    ),
    "stopped": (COMPLETION, {"prompt": "Hi", "max_tokens": 20, "stop": ["e", "a"], "temperature": 1.0, "n": 2}),
    "with usage": (CHAT, {**LONG, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    "of no token": (COMPLETION, {"prompt": "Hi", "max_tokens": 0, "echo": True}),
    "echoed": (COMPLETION, {"prompt": "Hi", "max_tokens": 4, "echo": True}),
}


@pytest.fixture(autouse=True)
def known_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer has the ids and the random numbers of one seed, so that two can be compared byte for byte."""
    monkeypatch.setattr("serve.cluster.gateway.Begun", lambda: Begun(SEED, 1e9))
    monkeypatch.setattr("serve.cluster.relay.PAUSE", 0.0)


def cut(gateway: Gateway, path: str, body: Mapping[str, Any], *after: int) -> str:
    """A stream whose replicas are lost after so many messages each."""
    gateway.engines.breaks[:] = after
    response = gateway.post(path, **body)
    gateway.engines.breaks.clear()
    assert response.status_code == 200
    return response.text


def untimed(text: str) -> str:
    """Without how long things took, and how much was found in a cache that fills meanwhile."""
    return re.sub(r'"(\w+_duration|cached_tokens|cache_\w+|input_tokens)": \d+', r'"\1": 0', text)


def parted(text: str) -> list[str]:
    """The events of a stream, those of each choice together: how choices take turns is a matter of time."""
    events = text.replace("\n\n", "\n").splitlines()
    return sorted(events, key=lambda event: int((re.findall(r'"choices": \[{"index": (\d+)', event) or ["-1"])[0]))


def moved(gateway: Gateway, outcome: str = "moved") -> float:
    """How many streams were moved since the gateway began."""
    text = gateway.http.get("/metrics").text
    return float(re.search(rf'^qhub_gateway_lost_total{{outcome="{outcome}"}} (.*)$', text, re.MULTILINE).group(1))


@pytest.mark.parametrize("model", ["delta", "tiny"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_goes_on_is_the_same(gateway: Gateway, kind: str, model: str) -> None:
    """Wherever its replica is lost, and the next one's too, a stream is byte for byte what it would have been."""
    path, asked = KINDS[kind]
    body = {"model": model, "stream": True, **asked}
    whole = parted(untimed(cut(gateway, path, body)))
    before, messages = moved(gateway), sum(not line.startswith("event: ") for line in whole)
    for after in range(messages + 2):
        assert parted(untimed(cut(gateway, path, body, after))) == whole
    for first, second in ((2, 2), (3, 5), (messages, 2), (4, messages)):
        assert parted(untimed(cut(gateway, path, body, first, second))) == whole
    assert moved(gateway) - before >= messages - 2


def test_ids_and_draws_are_new_each_time(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a seed two answers differ, and so do their ids."""
    monkeypatch.undo()
    body = {"model": "delta", "stream": True, **LONG, "max_tokens": 30, "temperature": 2.0}
    first, second = (gateway.post(CHAT, **body).text for _ in range(2))
    texts = ["".join(re.findall(r'"content": "([^"]*)"', text)) for text in (first, second)]
    ids = [set(re.findall(r"chatcmpl-\w+", text)) for text in (first, second)]
    assert texts[0] != texts[1]
    assert [len(each) for each in ids] == [1, 1]
    assert ids[0] != ids[1]


def lost(text: str) -> dict[str, Any]:
    """The error that a stream ends with."""
    last = [line for line in text.splitlines() if line and line != "data: [DONE]"][-1]
    error = json.loads(last.removeprefix("data: "))
    assert error["error"]
    return error


@pytest.mark.parametrize("path", STREAMS)
def test_streams_that_cannot_go_on(gateway: Gateway, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without moves, a stream whose replica is lost behind its first event ends with an error that its client reads."""
    monkeypatch.setattr("serve.cluster.gateway.Relay", lambda *given: Relay(*given[:-1], 0))
    body = {"model": "delta", "stream": True, **STREAMS[path]}
    whole, seen = untimed(cut(gateway, path, body)), set()
    for after in range(12):
        text = cut(gateway, path, body, after)
        if untimed(text) == whole:
            seen.add("whole")
            continue
        seen.add("lost")
        assert after >= 2
        lost(text)
        if path == "/v1/responses":
            numbers = [json.loads(line[6:])["sequence_number"] for line in text.splitlines() if line[:5] == "data:"]
            assert numbers == list(range(len(numbers)))
    assert seen == {"whole", "lost"}


def test_a_stream_moves_a_bounded_number_of_times(gateway: Gateway) -> None:
    """A request that ends every replica it comes to ends three of them, and not all there are."""
    body = {"model": "delta", "stream": True, **LONG}
    before, asked = moved(gateway, "lost"), len(gateway.engines.asked)
    text = cut(gateway, CHAT, body, 3, 3, 3, 3)
    assert lost(text)["error"]["code"] == "replica_lost"
    assert len(gateway.engines.asked) - asked == 3
    assert moved(gateway, "lost") - before == 1


def test_what_has_scores_of_its_prompt_does_not_move(gateway: Gateway) -> None:
    """The scores of a prompt are not noted, so such a stream ends with an error, as it did before streams moved."""
    body = {"model": "delta", "stream": True, "prompt": "Hi", "max_tokens": 5, "echo": True, "logprobs": 1}
    assert lost(cut(gateway, COMPLETION, body, 3))["error"]["code"] == "replica_lost"


def test_another_answer_is_not_joined_to_it(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another replica begins otherwise, the stream ends with an error: no client gets parts of two answers."""

    def other(call: Call, outputs, spent, lost) -> Call:
        return replace(call, begun=Begun("other", 1e9, tuple(outputs), is_noted=True))

    monkeypatch.setattr(Call, "again", other)
    body = {"model": "delta", "stream": True, **LONG}
    assert lost(cut(gateway, CHAT, body, 4))["error"]["code"] == "replica_lost"


def test_a_replica_that_is_full_or_gone_is_passed_over(gateway: Gateway) -> None:
    """While others are drained or lost at once, a stream is tried again until one goes on with it."""
    body = {"model": "delta", "stream": True, **LONG}
    whole = cut(gateway, CHAT, body)
    assert cut(gateway, CHAT, body, 4, 0, 0) == whole
