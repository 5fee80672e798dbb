"""Chat templates in processes apart: what transformers writes, and no template holds or ends anything."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as some

from adapterhub_local.base.chat_template import ChatWriter
from adapterhub_local.base.named_templates import NAMED_TEMPLATES
from adapterhub_local.base.renderer import Renderer, TemplateBound, TemplateFailed, chat_text
from adapterhub_local.data.chat import check_chat
from adapterhub_local.errors import Incompatible, InputError
from adapterhub_local.export.ollama import learn_template
from adapterhub_local.rows.template import write_answers
from tests.base.template_attacks import ATTACKS, HARMLESS, LENGTH, MEMORY, loops
from tests.rows.families import FAMILIES
from tests.rows.family import tokenizer_of
from tests.serve.conftest import TOOL_TEMPLATE
from tests.tiny import byte_tokenizer

# newer versions of transformers do, and so does what is tested here; 5.17 writes "None"
LEAVES_NONE_OUT = not byte_tokenizer("{{ messages[0].content }}").apply_chat_template(
    [{"role": "user", "content": None}], tokenize=False
)
HONEST = {name: family.template for name, family in FAMILIES.items()} | NAMED_TEMPLATES | {"tools": TOOL_TEMPLATE}
USER = {"role": "user", "content": "Hello"}
TEXTS = some.text(max_size=40) | some.sampled_from(
    ["", " x \n", "<|im_end|>", "\ud800", "a\u0308\U0001f600", "{{ 1 }}"]
)
VALUES = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | TEXTS,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
CALLS = some.fixed_dictionaries({"function": some.fixed_dictionaries({"name": TEXTS, "arguments": VALUES})})
MESSAGES = some.lists(
    some.fixed_dictionaries(
        {"role": some.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXTS | some.none()},
        optional={"tool_calls": some.lists(CALLS, max_size=2), "reasoning_content": TEXTS, "thinking": TEXTS},
    ),
    min_size=1, max_size=5,
)  # fmt: skip
TOOLS = some.lists(
    some.fixed_dictionaries({"type": some.just("function"), "function": some.dictionaries(TEXTS, VALUES, max_size=3)}),
    max_size=2,
)


@pytest.fixture(scope="module")
def impatient() -> Iterator[Renderer]:
    """A renderer that gives a template a fifth of the time."""
    renderer = Renderer(processes=1, seconds=0.2)
    yield renderer
    renderer.close()


@pytest.fixture(scope="module")
def patient() -> Iterator[Renderer]:
    """One with all the time that a template may take."""
    renderer = Renderer(processes=1)
    yield renderer
    renderer.close()


@settings(max_examples=200)
@given(
    name=some.sampled_from(sorted(HONEST)), messages=MESSAGES, tools=TOOLS, begins=some.booleans(),
    continues=some.booleans(), variables=some.dictionaries(some.sampled_from(["enable_thinking", "day", "x"]), VALUES),
)  # fmt: skip
def test_honest_templates(
    name: str, messages: list[Any], tools: list[Any], begins: bool, continues: bool, variables: dict[str, Any]
) -> None:
    """Whatever the conversation, the text is what transformers writes; and it refuses what transformers refuses."""
    assume(LEAVES_NONE_OUT or all(each["content"] is not None for each in messages))
    tokenizer = tokenizer_of(FAMILIES[name]) if name in FAMILIES else byte_tokenizer(HONEST[name])
    expected, reason = "", ""
    try:
        expected = tokenizer.apply_chat_template(
            messages, tools=tools or None, chat_template=HONEST[name], tokenize=False, add_generation_prompt=begins,
            continue_final_message=continues, **variables,
        )  # fmt: skip
    except Exception as error:  # a template may raise whatever it likes
        reason = (str(error) or type(error).__name__)[:2000]
    try:
        written = chat_text(
            tokenizer, messages, template=HONEST[name], tools=tools, begins_answer=begins, continues=continues,
            variables=variables,
        )  # fmt: skip
    except TemplateFailed as failure:
        refused = str(failure)
    else:
        refused = ""
        assert written == expected
    assert refused == reason or (begins and continues and refused)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str, impatient: Renderer, patient: Renderer) -> None:
    """Every template that is made to hurt is refused with its reason, and the next one is written as ever."""
    template, words = ATTACKS[name]
    renderer = patient if words in (LENGTH, MEMORY) else impatient  # on a busy machine a short time could end first
    if words == HARMLESS:
        assert not renderer.render([USER], template).strip("<a")
    else:
        with pytest.raises(TemplateFailed) as refused:
            renderer.render([USER], template)
        assert words in str(refused.value)
        assert len(str(refused.value)) <= 2000
    assert renderer.render([USER], "{{ messages[0].content }}") == "Hello"


def test_others_are_written_meanwhile() -> None:
    """While templates take all the time they may, those of others are written."""
    own, ended = Renderer(processes=3, seconds=0.5), threading.Event()

    def attack() -> None:
        with pytest.raises(TemplateBound):
            own.render([USER], loops(9))
        ended.set()

    attacks = [threading.Thread(target=attack) for _ in range(2)]
    for thread in attacks:
        thread.start()
    written = 0
    while not ended.is_set():
        own.render([USER], "{{ messages[0].content }}")
        written += 1
    for thread in attacks:
        thread.join()
    own.close()
    assert written > 1


def test_a_process_that_was_killed() -> None:
    """If somebody ends the process, the conversation that it has is refused, and the next is written by another."""
    own = Renderer(processes=1)
    assert own.render([USER], "{{ messages[0].content }}") == "Hello"
    process = own._free.get()
    assert process is not None
    os.killpg(process.apart._process.pid, signal.SIGKILL)
    process.apart._process.wait()
    own._free.put(process)
    assert own.render([USER], "{{ messages[0].content }}") == "Hello"
    own.close()


def test_memory_of_one_is_not_that_of_the_next() -> None:
    """A process that has written much makes room for another: the bound is the same for the hundredth conversation."""
    long = [{"role": "user", "content": "a" * 3_000_000}]
    own = Renderer(processes=1)
    for number in range(30):
        template = f"{{% set x = messages[0].content * 9 %}}{{{{ x[:{number + 1}] }}}}"
        assert own.render(long, template) == "a" * (number + 1)
    own.close()


def test_variables_that_are_arguments() -> None:
    """A variable by the name of what the renderer takes itself is refused, not lost."""
    with pytest.raises(TemplateFailed, match="'tools' cannot be a variable"):
        chat_text(byte_tokenizer(), [USER], variables={"tools": 1})


def test_training_stops_at_once() -> None:
    """Rows of training that a template never comes to an end with stop the run with the row and the reason."""
    chat = check_chat([USER, {"role": "assistant", "content": "Hi"}], "x.jsonl:7")
    writer = ChatWriter(byte_tokenizer(loops(9)))
    with pytest.raises(InputError, match=r"x\.jsonl:7: the base's chat template cannot write this chat: it takes long"):
        write_answers(chat, writer, "answer")


def test_ollama_export() -> None:
    """An export that has to run the template refuses one without an end."""
    with pytest.raises(Incompatible, match="the 1 s of computing that a template may take"):
        learn_template(byte_tokenizer(loops(9)), "tiny")
