"""One question decides about a field that is not known: would it change the answer? Kinds, and a law over them."""

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.requests.generation import ChatRequest, CompletionRequest
from serve.requests.messages import Message
from serve.requests.responses import ResponsesRequest
from serve.requests.unsupported import IGNORED, NEUTRAL
from tests.serve.conftest import Server

USER = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Hello"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASK = {"model": "tiny", "messages": [USER], "max_tokens": 1}

# what other servers put into answers, and what editors add
MESSAGES = {
    "empty thoughts": [USER, {**SAID, "reasoning_content": ""}, USER],
    "thoughts as a list": [USER, {**SAID, "reasoning": None, "reasoning_details": [{"type": "x"}]}, USER],
    "provider's fields": [USER, {**SAID, "provider_specific_fields": {"a": 1}, "extra_content": None}, USER],
    "a refusal beside text": [USER, {**SAID, "refusal": "no", "annotations": [{"type": "url_citation"}]}, USER],
    "nulls of an answer": [USER, {**SAID, "audio": None, "function_call": None, "tool_calls": None}, USER],
    "ids and times": [{**USER, "id": 1, "timestamp": 1.5, "createdAt": "now", "metadata": {"a": "b"}}],
    "marks of caches": [{**USER, "cache_control": {"type": "ephemeral"}, "content": [
        {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}, "id": 3, "citations": None}]}],
    "parts by other names": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
}  # fmt: skip
# parameters at values that ask for nothing
NOTHING = [
    {"typical_p": 1.0}, {"tfs_z": 1}, {"mirostat": 0, "mirostat_tau": 5.0}, {"dry_multiplier": 0.0, "dry_base": 1.75},
    {"xtc_probability": 0, "xtc_threshold": 0.1}, {"repeat_penalty": 1.0}, {"cache_prompt": True}, {"echo": False},
    {"add_special_tokens": False}, {"request_id": "a"}, {"reasoning_effort": "none"}, {"verbosity": "low"},
    {"ignore_eos": None, "continue_final_message": None, "parse_special": None, "include_reasoning": None},
    {"stream_options": {"include_usage": None}}, {"stream_options": {"include_usage": True}},
    {"logprobs": False, "top_logprobs": 0}, {"stop": ""}, {"stop": []}, {"stop": ["", "x"]}, {"seed": 1.0},
    {"top_k": 40.0}, {"top_k": -1}, {"top_k": 0}, {"min_p": 0}, {"n": 1.0}, {"best_of": 1}, {"n": 2, "best_of": 2},
    {"chat_id": "a", "session_id": "b"}, {"usage": {"include": True}}, {"keep_alive": "5m"}, {"presence_penalty": 0},
    {"logit_bias": {}}, {"service_tier": "auto"}, {"store": False}, {"metadata": {"a": "b"}}, {"user": "u"},
    {"safety_identifier": "s", "prompt_cache_key": "k"}, {"parallel_tool_calls": True}, {"tools": []},
    {"functions": [], "function_call": "auto"}, {"modalities": ["text"], "audio": None}, {"bad_words": []},
    {"some_new_thing": None}, {"some_new_thing": {}}, {"some_new_thing": {"a": None, "b": []}}, {"max_tokens": 1.0},
    {"thinking_token_budget": 100}, {"max_thinking_tokens": 0}, {"max_completion_tokens": 1.0},
]  # fmt: skip
# what would change the answer, or what is asked for that is not given
SOMETHING = [
    ({"typical_p": 0.5}, "typical_p"), ({"mirostat": 2}, "mirostat"), ({"xtc_probability": 0.5}, "xtc_probability"),
    ({"repeat_penalty": 1.1}, "repeat_penalty"), ({"num_beams": 4}, "num_beams"), ({"best_of": 3}, "best_of"),
    ({"skip_special_tokens": False}, "skip_special_tokens"), ({"bad_words": ["a"]}, "bad_words"), ({"n": 2.5}, "n"),
    ({"functions": [{"name": "f"}]}, "functions"), ({"do_sample": False}, "do_sample"), ({"n": True}, "n"),
    ({"modalities": ["text", "audio"]}, "modalities"), ({"web_search_options": {"a": 1}}, "web_search_options"),
    ({"stream": True, "stream_options": {"chunk_size": 5}}, "stream_options"), ({"max_tokens": -2}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"), ({"seed": "1"}, "seed"),
    ({"top_logprobs": 3}, "top_logprobs"), ({"temprature": 0.5}, "temprature"), ({"echo": True}, "echo"),
    ({"reasoning_effort": "high"}, "reasoning_effort"), ({"reasoning_effort": "very"}, "reasoning_effort"),
    ({"messages": [{**USER, "audio": {"id": "a"}}]}, "messages"), ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{**SAID, "function_call": {"name": "f", "arguments": ""}}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"response_format": {"type": "json_object", "schema": {"type": "object"}}}, "response_format"),
]  # fmt: skip


def prompt_tokens(server: Server, **body) -> int:
    """How many tokens a chat's prompt has; it must be answered."""
    response = server.http.post("/v1/chat/completions", json={**ASK, **body})
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens"]


def test_what_no_template_reads_changes_nothing(server: Server) -> None:
    """Fields that only other programs read are taken, and the prompt is that without them."""
    for name, messages in MESSAGES.items():
        plain = [
            {"role": each["role"], "content": "Hello" if each["role"] == "assistant" else "Hi"} for each in messages
        ]
        assert prompt_tokens(server, messages=messages) == prompt_tokens(server, messages=plain), name


def test_parameters_that_ask_for_nothing(server: Server) -> None:
    """At a value that asks for nothing a parameter is accepted, and the answer is the same."""
    for change in NOTHING:
        response = server.http.post("/v1/chat/completions", json={**ASK, "temperature": 0, **change})
        assert response.status_code == 200, (change, response.text)


@pytest.mark.parametrize(("change", "param"), SOMETHING, ids=str)
def test_what_would_change_the_answer(server: Server, change: dict, param: str) -> None:
    """What is not supported and asks for something is 400, and named."""
    response = server.http.post("/v1/chat/completions", json={**ASK, **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
READ = {"prefix", "refusal", "audio", "function_call", "tool_calls", "tool_call_id", "name", "role", "content"}
UNREAD = st.dictionaries(
    st.text(max_size=12).filter(lambda name: name not in READ | {"reasoning_content", "reasoning", "thinking"}),
    VALUES,
    max_size=4,
)


@given(UNREAD, UNREAD, st.sampled_from(sorted(IGNORED - set(ChatRequest.model_fields))), VALUES)
def test_the_law_over_fields(outer: dict, inner: dict, name: str, value) -> None:
    """Whatever a message carries along, templates see the same; whatever an ignored parameter says, it is taken."""
    text = {"type": "text", "text": "Hi"}
    plain = Message.model_validate({"role": "user", "content": [text]})
    carried = Message.model_validate({**outer, "role": "user", "content": [{**inner, **text}]})
    assert carried.for_template() == plain.for_template()
    call = {**inner, "id": "c", "type": "function", "function": {**outer, "name": "f", "arguments": "{}"}}
    turn = Message.model_validate({**outer, "role": "assistant", "tool_calls": [call]})
    assert turn.for_template() == Message.model_validate({"role": "assistant", "tool_calls": [CALL]}).for_template()
    ChatRequest.model_validate({**ASK, name: value})
    CompletionRequest.model_validate({"model": "tiny", "prompt": "Hi", name: value})


@given(st.sampled_from(sorted(NEUTRAL)), st.integers(2, 9))
def test_the_law_over_parameters(name: str, value: int) -> None:
    """What is not supported is taken at its neutral values and refused by name at any other, on every endpoint."""
    for neutral in (None, *NEUTRAL[name]):
        ChatRequest.model_validate({**ASK, name: neutral})
    if name not in CompletionRequest.model_fields:
        with pytest.raises(pydantic.ValidationError) as caught:
            CompletionRequest.model_validate({"model": "tiny", "prompt": "Hi", name: value})
        assert caught.value.errors()[0]["ctx"]["param"] == name


@given(st.integers(1, 10**6))
def test_whole_numbers(number: int) -> None:
    """A whole number means the same written with a point; one that is not whole is refused."""
    for field in ("max_tokens", "seed", "min_tokens", "top_k"):
        assert getattr(ChatRequest.model_validate({**ASK, field: float(number)}), field) == number
        with pytest.raises(pydantic.ValidationError):
            ChatRequest.model_validate({**ASK, field: number + 0.5})


def test_all_there_is_room_for(server: Server) -> None:
    """`max_tokens` -1 is as long as the context goes, on both endpoints."""
    longest = server.service.engine.max_length
    for path, asked in (("chat/completions", {"messages": [USER]}), ("completions", {"prompt": "Hi"})):
        body = {"model": "tiny", **asked, "max_tokens": -1, "ignore_eos": True}
        usage = server.http.post(f"/v1/{path}", json=body).json()["usage"]
        assert usage["total_tokens"] == longest


def test_usage_in_every_chunk(server: Server) -> None:
    """`continuous_usage_stats` is served: each chunk says how many tokens there are so far, never fewer than before."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**ASK, "max_tokens": 5, "ignore_eos": True}
    chunks = list(server.client.chat.completions.create(
        **{key: value for key, value in body.items() if key != "ignore_eos"}, stream=True, stream_options=options,
        extra_body={"ignore_eos": True}))  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 5)


def test_a_begun_answer_by_its_other_name(server: Server) -> None:
    """`prefix` of the last message is `continue_final_message`: it asks for something, so it is not left out."""
    turns = [USER, {**SAID, "prefix": True}]
    continued = prompt_tokens(server, messages=[USER, SAID], continue_final_message=True)
    assert prompt_tokens(server, messages=turns) == continued != prompt_tokens(server, messages=[USER, SAID])


def test_thoughts_reach_a_template_that_shows_them(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was thought before is read by templates that read it, under each name that servers have for it."""
    template = "{% for m in messages %}{{ m.reasoning_content or '' }}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(server.service.base.tokenizer, "chat_template", template)
    for name in ("reasoning_content", "reasoning", "thinking"):
        more = prompt_tokens(server, messages=[USER, {**SAID, name: "hmm"}]) - prompt_tokens(
            server, messages=[USER, SAID]
        )
        assert more == 3, name


@pytest.mark.parametrize("item", [
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello", "annotations": [1]}],
     "phase": "x", "id": "msg_1", "status": "completed", "new_field": 1},
    {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "Hello"}]},
])  # fmt: skip
def test_items_that_come_back(item: dict) -> None:
    """Items of answers are read by what they say; thoughts that another server encrypted are passed over."""
    hidden = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
    body = {"model": "tiny", "input": [USER, hidden, item, USER], "include": ["reasoning.encrypted_content"]}
    request = ResponsesRequest.model_validate(body)
    turns = request.chat(request.input).messages
    assert [turn.for_template()["content"] for turn in turns] == ["Hi", "Hello", "Hi"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", ASK),
        ("/v1/completions", {"model": "tiny", "prompt": "Hi"}),
        ("/v1/responses", {"model": "tiny", "input": "Hi"}),
        ("/v1/embeddings", {"model": "tiny", "input": "Hi"}),
        ("/v1/score", {"model": "tiny", "prompt": "Hi", "choices": ["a"]}),
        ("/v1/feedback", {"id": "chatcmpl-1", "rating": 1}),
        ("/v1/load_lora_adapter", {"lora_name": "alpha"}),
        ("/v1/unload_lora_adapter", {"lora_name": "alpha"}),
        ("/tokenize", {"prompt": "Hi"}),
        ("/detokenize", {"tokens": [65]}),
    ],
)
def test_an_unknown_parameter_is_called_so(server: Server, path: str, body: dict) -> None:
    """Wherever bodies are read: a 400 with its name and OpenAI's code, in words about the request."""
    answer = server.http.post(path, json={**body, "stars": 5})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "stars", "unknown_parameter"), error
    assert "there is no such parameter" in error["message"]
