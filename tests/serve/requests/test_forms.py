"""What the answer looks like, in vLLM's ways, and what stands before it: variables of the template, a begun answer."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher
from transformers import GenerationConfig

from serve.requests.generation import CompletionRequest
from serve.requests.messages import Message, StructuredOutputs
from serve.text.grammar import structured_grammar
from serve.text.prompt import sampling_defaults
from tests.serve.conftest import Server

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
POINT = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "clock"}}


def answer(server: Server, **body) -> str:
    """The text of a chat's answer."""
    body = {"model": "alpha", "messages": MESSAGES, "max_tokens": 80, **body}
    response = server.http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("adapter", ["tiny", "beta", "alpha*0.5+gamma*0.5"])
def test_structured_outputs(server: Server, adapter: str) -> None:
    """Any model answers with one of the choices, by the pattern, the schema or the grammar, and then stops."""
    labels = ["positive", "negative", 'a "quoted" é\n']
    for seed in range(3):
        assert answer(server, model=adapter, structured_outputs={"choice": labels}, seed=seed) in labels
    assert re.fullmatch("[0-9]{3}/x", answer(server, model=adapter, structured_outputs={"regex": "[0-9]{3}/x"}))
    assert json.loads(answer(server, model=adapter, structured_outputs={"json": POINT}))["x"] in (1, 2)
    spoken = answer(server, model=adapter, structured_outputs={"grammar": 'start: "is" (" not")? " so"'})
    assert spoken in ("is so", "is not so")
    body = {"model": adapter, "prompt": "Hi", "structured_outputs": {"choice": ["yes", "no"]}}
    assert server.complete(**body).json()["choices"][0]["text"] in ("yes", "no")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=5))
def test_every_text_can_be_a_choice(choices: list[str]) -> None:
    """Whatever the choices are, they make a sound grammar."""
    problem = LLMatcher.validate_grammar(structured_grammar(StructuredOutputs(choice=choices)))
    assert not problem, problem


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "[a-"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "tools": [TOOL]}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ],
    ids=str,
)
def test_forms_that_cannot_be(server: Server, change: dict, param: str) -> None:
    """What is unsound, contradicts itself or would change nothing is 400 and named, with what to use instead."""
    response = server.http.post(CHAT, json={"model": "alpha", "messages": MESSAGES, "max_tokens": 4, **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    if param == "guided_choice":
        assert "did you mean structured_outputs?" in response.json()["error"]["message"]


def test_variables_of_the_template(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """`chat_template_kwargs` reach a template that knows them, and change the prompt."""
    template = "{{ messages[0].content }}{% if enable_thinking is not false %}<think>{% endif %}"
    monkeypatch.setattr(server.service.base.tokenizer, "chat_template", template)
    reader = server.service.reader.prompts
    sizes = []
    for given_ in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        body = {"model": "alpha", "messages": MESSAGES, "max_tokens": 1, "chat_template_kwargs": given_}
        sizes.append(server.http.post(CHAT, json=body).json()["usage"]["prompt_tokens"])
    plain, thinking = (len(reader.plain(text)) for text in ("Hello", "Hello<think>"))
    assert sizes == [thinking, thinking, plain]


def test_what_the_bases_makers_recommend(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request does not say of sampling is taken from the base's generation config, if that samples at all."""
    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, repetition_penalty=1.5)
    reader, model = server.service.reader, server.service.base.model
    assert sampling_defaults(model) == {}
    monkeypatch.setattr(model, "generation_config", config)
    monkeypatch.setattr(reader, "defaults", sampling_defaults(model))
    ask = {"model": "tiny", "prompt": "Hello"}
    (choice,) = reader.choices(CompletionRequest(**ask))
    params = choice.params
    assert (params.temperature, params.top_k, params.repetition_penalty, params.top_p) == (0.6, 20, 1.5, 1.0)
    (choice,) = reader.choices(CompletionRequest(**ask, temperature=0.0, top_k=-1, repetition_penalty=1.0, min_p=0.0))
    assert (choice.params.temperature, choice.params.top_k, choice.params.repetition_penalty) == (0.0, None, 1.0)
    assert server.client.responses.create(model="tiny", input="Hello", max_output_tokens=1).temperature == 0.6
    config.do_sample = False
    assert sampling_defaults(model) == {}


def test_an_answer_that_was_begun_is_continued(server: Server) -> None:
    """`continue_final_message` goes on inside the last message: as a completion of that very text does."""
    turns = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    reader = server.service.reader.prompts
    prompt = reader.chat([Message(**turn) for turn in turns], continues=True, begins_answer=False)
    assert reader.text(prompt).endswith("It is")
    expected = server.complete(model="beta", prompt=list(prompt)).json()["choices"][0]["text"]
    body = {"model": "beta", "messages": turns, "max_tokens": 8, "temperature": 0, "continue_final_message": True}
    for more in ({}, {"add_generation_prompt": False}):
        said = server.http.post(CHAT, json=body | more).json()["choices"][0]["message"]["content"]
        assert said == expected
