"""Every answer is what the official client's types demand, checked strictly: no required field is missing or wrong."""

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response

from tests.serve.conftest import Server

USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
CHAT = {"model": "alpha", "messages": [USER], "max_tokens": 60}
BODIES = {
    "a chat": ("chat/completions", CHAT, ChatCompletion),
    "a call": ("chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": "required"}, ChatCompletion),
    "a chat's log-probabilities": ("chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}, ChatCompletion),
    "a completion": ("completions", {"model": "alpha", "prompt": "Hi", "logprobs": 1, "n": 2}, Completion),
    "a response": ("responses", {"model": "alpha", "input": "Hi", "max_output_tokens": 9}, Response),
    "a called response": (
        "responses", {"model": "alpha", "input": "Hi", "tools": [{"type": "function", **TOOL["function"]}],
                      "tool_choice": "required", "max_output_tokens": 60}, Response),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_answers_have_what_the_types_require(server: Server, name: str) -> None:
    """Strict validation of a whole answer by the class that the client reads it with."""
    path, body, kind = BODIES[name]
    answer = server.http.post(f"/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    kind.model_validate(answer.json(), strict=True)


def test_chunks_and_models(server: Server) -> None:
    """The same of every chunk of a stream, and of every model."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    with server.http.stream(
        "POST", "/v1/chat/completions", json={**CHAT, "stream": True, "stream_options": options}
    ) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    for line in lines:
        ChatCompletionChunk.model_validate_json(line, strict=True)
    for model in server.http.get("/v1/models").json()["data"]:
        Model.model_validate(model, strict=True)
