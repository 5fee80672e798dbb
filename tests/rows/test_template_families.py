"""What is learned under the chat templates of real families: answers behind the server's prompt, and nothing else."""

import pytest

from adapterhub_local.base.chat_settings import ChatSettings
from adapterhub_local.base.chat_template import ChatWriter
from adapterhub_local.base.tool_format import format_of
from adapterhub_local.data.chat import Chat, check_chat
from adapterhub_local.errors import BadData
from adapterhub_local.rows.examples import Tokenised, tokenise_all
from serve.requests.messages import Message, Tool
from serve.text.prompt import PromptReader
from tests.rows.conversations import (
    A1,
    KINDS,
    SECOND,
    SINGLE,
    SYSTEM,
    THOUGHT,
    TOOLS,
    U1,
    U2,
    Said,
    has_calls,
    refuses,
    said,
    tokenised,
)
from tests.rows.families import FAMILIES
from tests.rows.family import Family, stops_of, tokenizer_of


def words(message: Said) -> list[str]:
    """What a message says, its thoughts apart; of a call its arguments."""
    cities = [call["function"]["arguments"]["city"] for call in message.get("tool_calls", ())]
    return [text for text in (message["content"].split("</think>")[-1].strip(), *cities) if text]


def check_learned(family: Family, messages: list[Said], found: Tokenised) -> None:
    """The laws: each answer once, behind what the server sends for it, ending in a stop, without another's words; and
    every message is somewhere in what was written."""
    tokenizer, stops = tokenizer_of(family), stops_of(family)
    writer = ChatWriter(tokenizer, ChatSettings(template_args=dict(family.variables), day="2026-01-01"), stops)
    tools = check_chat(messages, "x:1", tools=TOOLS).tools if has_calls(messages) else ()
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [(example, span) for example in found.examples for span in example.spans]
    assert len(spans) == len(answers)
    for turn, (example, (start, end)) in zip(answers, spans, strict=True):
        learned, others = tokenizer.decode(example.ids[start:end]), [m for n, m in enumerate(messages) if n != turn]
        assert all(text in learned for text in words(messages[turn])), learned
        assert not any(text in learned for m in others if m["role"] != "tool" for text in words(m)), learned
        assert "rain over" not in learned, "results are the tool's"
        assert example.ids[end - 1] in stops, learned
        assert not stops & set(example.ids[start : end - 1]), "an answer goes on behind a stop"
        (prompt,) = writer.encode([writer.write(messages[:turn], tools, begins_answer=True)])
        assert list(example.ids[:start]) == prompt
    text = "".join(tokenizer.decode(example.ids) for example in found.examples)
    assert all(said in text for message in messages for said in words(message))
    assert not found.lost


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_every_family(name: str, kind: str) -> None:
    """Under every template each answer is learned behind its own prompt up to a stop, or the reason is given."""
    family, messages = FAMILIES[name], KINDS[kind]
    if refuses(family, kind):
        with pytest.raises(BadData, match=r"leaves out|refuses this chat|without thoughts, and it has some"):
            tokenised(family, messages)
        return
    found = tokenised(family, messages)
    check_learned(family, messages, found)
    if kind == "several turns":
        assert bool(found.divided) == family.divides == (len(found.examples) == 2)
    if kind == "thoughts":
        assert THOUGHT in tokenizer_of(family).decode(found.examples[0].ids)
    if has_calls(messages):
        assert '"weather"' in tokenizer_of(family).decode(found.examples[0].ids), "the schema"


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "second system" in family.lacks])
def test_a_system_message_without_a_place(name: str) -> None:
    """`system_role = "user"` gives a system message a place before the user's text in templates that have none."""
    family, messages = FAMILIES[name], KINDS["second system"]
    found = tokenised(family, messages, system="user")
    text = "".join(tokenizer_of(family).decode(example.ids) for example in found.examples)

    assert f"{SYSTEM}\n\n{U1}" in text
    assert f"{SECOND}\n\n{U2}" in text
    with pytest.raises(BadData, match=r"system_role = 'user'"):
        tokenised(family, messages)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_the_servers(name: str) -> None:
    """The tokens before an answer are those that the server sends the model for the same messages."""
    family = FAMILIES[name]
    if "strftime_now" in family.template:
        family = Family(family.template.replace("strftime_now", "'2026' or "), *list(vars(family).values())[1:])
    tokenizer = tokenizer_of(family)
    reader = PromptReader(tokenizer, len(tokenizer))
    for messages, tools in ((SINGLE, []), (KINDS["tools"], TOOLS)):
        example = tokenised(family, messages).examples[0]
        asked = messages[: [message["role"] for message in messages].index("assistant")]
        offered = [Tool.model_validate(tool) for tool in tools]
        prompt = reader.chat([Message.model_validate(message) for message in asked], offered, dict(family.variables))

        assert example.ids[: example.spans[0][0]] == prompt


@pytest.mark.parametrize("kind", ["system and several turns", "tools", "two calls"])
def test_labels_are_those_of_generation_blocks(kind: str) -> None:
    """Where a template marks what the assistant says, as TRL's do for training, exactly that is learned."""
    family, messages = FAMILIES["qwen 2.5 for training, answers in generation blocks"], KINDS[kind]
    (example,) = tokenised(family, messages).examples
    marked = tokenizer_of(family).apply_chat_template(
        messages, tools=TOOLS if has_calls(messages) else None, return_dict=True, return_assistant_tokens_mask=True
    )
    learned = [number for start, end in example.spans for number in range(start, end)]

    assert list(example.ids) == marked["input_ids"][: len(example.ids)]
    assert learned == [number for number, is_said in enumerate(marked["assistant_masks"]) if is_said]


def test_what_is_lost_can_be_accepted() -> None:
    """What a template leaves out is an error that counts it, or a note where the recipe accepts it."""
    family = FAMILIES["exaone 4, drops thoughts"]
    with pytest.raises(BadData, match=r"leaves out the thoughts of an answer in 1 of 1 examples, the first is x:1"):
        tokenised(family, KINDS["thoughts"])
    (note,) = tokenised(family, KINDS["thoughts"], left_out="accept").notes()
    assert note == "the chat template leaves out the thoughts of an answer in 1 example, the first is x:1"


def test_the_stop_that_is_learned_is_said() -> None:
    """Where a template ends an answer with nothing, what is put behind it is what the server stops at, and is said."""
    for name, stop in (
        ("glm 4.5, the next turn's mark ends an answer", "<|user|>"),
        ("glm on a base that stops at the end of text only", "<|endoftext|>"),
    ):
        notes = tokenised(FAMILIES[name], SINGLE).notes()
        (note,) = notes
        assert note == (
            f"the chat template ends 1 answer without a token at which the server stops: '{stop}' is added at the end "
            "and learned"
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_described_tools_are_named(name: str) -> None:
    """A run says that tools are described where it does so, and nothing where the template's own form is learned."""
    family = FAMILIES[name]
    notes = " ".join(tokenised(family, KINDS["tools"]).notes())

    assert ("calls and their results in 1 chat are learned as text" in notes) == format_of(family.template).is_prompted
    assert "are described" not in " ".join(tokenised(family, SINGLE).notes())


def test_dates_do_not_move() -> None:
    """A template that prints today's date prints the same one in every run, and the run says so."""
    found = tokenised(FAMILIES["granite, today's date"], SINGLE)

    assert "January 01, 2026" in tokenizer_of(FAMILIES["granite, today's date"]).decode(found.examples[0].ids)
    assert found.notes() == ["the chat template prints today's date: training always writes 2026-01-01 (data.date)"]


def test_thoughts_are_gone_on_with() -> None:
    """A prompt that opens a thought is answered with the thought and its end, or with its end at once."""
    family = FAMILIES["deepseek r1, drops thoughts and opens one"]
    tokenizer = tokenizer_of(family)
    for answer, wanted in (
        (A1, f"\n</think>\n\n{A1}</s>"),
        (f"<think>\nlong\n</think>\n\n{A1}", f"long\n</think>\n\n{A1}</s>"),
    ):
        (example,) = tokenised(family, [said("user", U1), said("assistant", answer)]).examples
        ((start, end),) = example.spans
        assert tokenizer.decode(example.ids[:start]).endswith("<A><think>\n")
        assert tokenizer.decode(example.ids[start:end]) == wanted
    thought = {"role": "assistant", "content": A1, "reasoning_content": "long"}
    chat = Chat("x:1", (said("user", U1), thought))
    (example,) = tokenise_all([chat], tokenizer, 512, stops=stops_of(family)).examples
    assert tokenizer.decode(example.ids[slice(*example.spans[0])]) == f"long\n</think>\n\n{A1}</s>"
