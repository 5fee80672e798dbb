"""Thoughts are distinguished from the answer, streamed or whole, bounded, and never mixed with a form."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.data.chat import MARKS
from serve.text.thoughts import MAX_BACK, Place, ThoughtBound, ThoughtFormat, ThoughtReader
from tests.serve.conftest import Server
from tests.tiny import byte_tokenizer

USER = {"role": "user", "content": "Hi"}
# in the manner of DeepSeek-R1, which opens the thought itself, and of Qwen 3 with its switch
OPENS = (
    "{% for m in messages %}<{{ m.role }}>{{ (m.content or '').split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)
PARTS = st.sampled_from(["<think>", "</think>", "<", "think", ">", " ", "\n", "a", "b\n\n", "</"])
CUTS = st.lists(st.integers(1, 5), max_size=40)


def read(form: ThoughtFormat, place: Place, pieces: list[str]) -> tuple[str, str]:
    """What is thought and said in a text that comes in pieces."""
    reader = ThoughtReader(form, place)
    found = [*map(reader.push, pieces), reader.flush()]
    return "".join(each[0] for each in found), "".join(each[1] for each in found)


@given(st.lists(PARTS, max_size=9), CUTS, st.sampled_from([Place.BEFORE, Place.INSIDE]))
def test_thoughts_do_not_depend_on_how_text_is_cut(parts: list[str], sizes: list[int], place: Place) -> None:
    """However tokens cut the text, the same is thought and said, without marks and blanks around the thought."""
    form = ThoughtFormat("<think>", "</think>", {}, {})
    text, start, pieces = "".join(parts), 0, []
    for size in [*sizes, len(text) + 1]:
        pieces.append(text[start : start + size])
        start += size
    thought, said = read(form, place, pieces)
    assert (thought, said) == read(form, place, [text])
    assert thought == thought.strip()
    if place is Place.BEFORE and not text.lstrip().startswith("<think>") and not "<think>".startswith(text.lstrip()):
        assert (thought, said) == ("", text)


@pytest.mark.parametrize(("begin", "end"), MARKS)
def test_every_family(begin: str, end: str) -> None:
    """Marks of every family are read, whether the template or the model opened the thought; no cut mark is reported."""
    form = ThoughtFormat(begin, end, {}, {})
    assert read(form, Place.BEFORE, [f"{begin}\n2 + 2\n{end}\n\n4"]) == ("2 + 2", "4")
    assert read(form, Place.INSIDE, [f"2 + 2{end}4"]) == ("2 + 2", "4")
    assert read(form, Place.BEFORE, ["4 is it"]) == ("", "4 is it")
    assert read(form, Place.INSIDE, ["2 +", f" 2\n{end[:-1]}"]) == ("2 + 2", "")
    assert read(form, Place.PAST, [f"{begin}4"]) == ("", f"{begin}4")


@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=30),
    st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=MAX_BACK), max_size=3),
    st.sampled_from([Place.BEFORE, Place.INSIDE]),
    st.integers(0, 5),
)
def test_what_was_tried_is_taken_back(tokens: list[int], tried: list[list[int]], place: Place, limit: int) -> None:
    """Guesses that an answer did not take leave no trace in a bound: it allows and forces what it did."""
    tokenizer, form = byte_tokenizer(), ThoughtFormat("<think>", "</think>", {}, {})
    tokens = [*tokenizer.encode("a<think>\u00e9", add_special_tokens=False), *tokens]
    plain, tries = (ThoughtBound(tokenizer, form, place, limit, len(tokenizer)) for _ in range(2))
    for number, token in enumerate(tokens):
        for guesses in tried[number % 3 : number % 3 + 1]:
            for guess in guesses:
                tries.advance(guess)
            tries.rollback(len(guesses))
        assert (tries.allowed(), tries.forced()) == (plain.allowed(), plain.forced())
        plain.advance(token)
        tries.advance(token)


@pytest.fixture
def thinking(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, its base with a template that has it think."""
    monkeypatch.setattr(server.service.base.tokenizer, "chat_template", OPENS)
    monkeypatch.setattr(server.service.reader.prompts, "_writers", type(server.service.reader.prompts._writers)())
    return server


def ask(server: Server, **body) -> dict:
    """The body of a chat's answer."""
    body = {"model": "alpha", "messages": [USER], "max_tokens": 40, "temperature": 0, "ignore_eos": True, **body}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    "bound", [{"thinking_token_budget": 6}, {"max_thinking_tokens": 6, "reasoning_effort": "high"}]
)
def test_a_bounded_thought(thinking: Server, bound: dict) -> None:
    """After its bound the thought is closed and the answer begins; streamed the same, and by /v1/responses."""
    body = ask(thinking, **bound)
    message, usage = body["choices"][0]["message"], body["usage"]
    assert message["reasoning_content"]
    assert message["content"]
    assert "think>" not in message["reasoning_content"] + message["content"]
    closing = len(thinking.service.base.tokenizer.encode("\n</think>"))
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 6 + closing
    asked = {"model": "alpha", "messages": [USER], "max_tokens": 40, "temperature": 0, "stream": True}
    stream = thinking.client.chat.completions.create(**asked, extra_body={"ignore_eos": True, **bound})
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message["reasoning_content"]
    assert "".join(delta.content or "" for delta in deltas) == message["content"]
    create = thinking.client.responses.create
    asked = {"model": "alpha", "input": "Hi", "max_output_tokens": 40, "temperature": 0}
    asked["extra_body"] = {"ignore_eos": True, **bound}
    asked["reasoning"] = {"effort": asked["extra_body"].pop("reasoning_effort", None)}
    whole = create(**asked)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.output[0].content[0].text == message["reasoning_content"]
    assert whole.output_text == message["content"]
    events = list(create(**asked, stream=True))
    told = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert told == message["reasoning_content"]
    assert [item.type for item in events[-1].response.output] == ["reasoning", "message"]


def test_no_thought(thinking: Server) -> None:
    """Thinking is switched off by effort, by a bound of nothing or by the template's own variable, alike."""
    found = [
        ask(thinking, **change)
        for change in (
            {"reasoning_effort": "none"},
            {"thinking_token_budget": 0},
            {"chat_template_kwargs": {"enable_thinking": False}},
        )
    ]
    assert all("reasoning_content" not in body["choices"][0]["message"] for body in found)
    assert len({body["choices"][0]["message"]["content"] for body in found}) == 1
    thought = ask(thinking)["choices"][0]["message"]  # without a bound it thinks until it is cut
    assert thought["content"] == ""
    assert thought["reasoning_content"]
    hidden = ask(thinking, thinking_token_budget=6, include_reasoning=False)["choices"][0]["message"]
    assert "reasoning_content" not in hidden
    assert hidden["content"]


def test_a_form_comes_after_thoughts(thinking: Server) -> None:
    """A form is that of the answer, not of the thought before it, and a thought in a grammar of one's own is none."""
    form = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}
    for wanted in ({"response_format": form}, {"structured_outputs": {"regex": '"(yes|no)"'}}):
        body = ask(thinking, **wanted, thinking_token_budget=5, max_tokens=60, ignore_eos=False, temperature=1)
        message = body["choices"][0]["message"]
        assert json.loads(message["content"]) in ("yes", "no")
        assert message["reasoning_content"]
    grammar = {"structured_outputs": {"grammar": 'start: "yes" | "no"'}}
    message = ask(thinking, **grammar, ignore_eos=False)["choices"][0]["message"]
    assert message["content"] in ("yes", "no")
