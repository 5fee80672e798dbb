"""Data: every format becomes the same chats, what is learned is exactly the answers, and nothing is lost silently."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_local.data.chat import Chat, is_learned
from adapterhub_local.data.columns import recognise
from adapterhub_local.data.dataset import read_data
from adapterhub_local.data.files import read_rows
from adapterhub_local.data.formats import read_chat
from adapterhub_local.errors import BadData, InputError
from adapterhub_local.recipe.schema import Data
from adapterhub_local.rows.examples import read_chats, tokenise_all
from tests.chats import chat, learned, recipe_with, write_rows
from tests.tiny import byte_tokenizer

PAIR = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": PAIR},
    "sharegpt": {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]},
    "alpaca": {"instruction": "why?", "input": "", "output": "so"},
    "prompt-completion": {"prompt": "why?", "completion": "so"},
    "text": {"text": "why? so"},
}


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.ndjson", "a.data"]
)
def test_every_file_type_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    """Quotes, commas, line ends and other scripts come through every file type, each row with its place."""
    rows = [{"prompt": 'a "b", c\nd\te', "completion": "ü 日本"}, {"prompt": "x", "completion": "y"}]
    read = list(read_rows(write_rows(tmp_path / name, rows)))

    assert [row for _, row in read] == rows
    assert all(where.startswith(str(tmp_path / name)) for where, _ in read)
    assert read[0][0] != read[1][0]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.jsonl.gz", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_and_line_ends(tmp_path: Path, name: str, encoding: str, end: str) -> None:
    """What Windows and spreadsheets write is read as what it says: marks, UTF-16, CRLF, empty lines."""
    rows = [{"prompt": "Grüße", "completion": "🙂"}, {"prompt": "b", "completion": "c"}]
    written = write_rows(tmp_path / name, rows).read_bytes()
    text = (gzip.decompress(written) if name.endswith(".gz") else written).decode().replace("\r\n", "\n")
    data = text.replace("\n", end * (2 if "json" in name else 1)).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)

    assert [row for _, row in read_rows(tmp_path / name)] == rows


def test_a_semicolon_between_columns(tmp_path: Path) -> None:
    """A CSV file as European spreadsheets write it; a comma in the header still means commas."""
    (tmp_path / "a.csv").write_text('prompt;completion\n"a;1";b\n')
    (tmp_path / "b.csv").write_text("prompt,completion;note\na,b;c\n")

    assert [row for _, row in read_rows(tmp_path / "a.csv")] == [{"prompt": "a;1", "completion": "b"}]
    assert [row for _, row in read_rows(tmp_path / "b.csv")] == [{"prompt": "a", "completion;note": "b;c"}]


def test_json_files_of_other_shapes(tmp_path: Path) -> None:
    """A table with one list, JSON lines called .json, JSON called .jsonl, and one example alone are what they are."""
    (tmp_path / "list.jsonl").write_text(json.dumps([{"a": 1}, {"a": 2}], indent=1))
    (tmp_path / "told.json").write_text(json.dumps({"version": 1, "data": [{"a": 1}, {"a": 2}]}))
    (tmp_path / "chat.json").write_text(json.dumps({"messages": [{"role": "user"}]}))
    for name in ("list.jsonl", "told.json"):
        assert [row for _, row in read_rows(tmp_path / name)] == [{"a": 1}, {"a": 2}]
    assert [row for _, row in read_rows(tmp_path / "chat.json")] == [{"messages": [{"role": "user"}]}]
    (tmp_path / "table.json").write_text(json.dumps({"data": [{"a": 1}, {"a": 2}]}))
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "one.json").write_text(json.dumps({"a": 1}, indent=1))

    assert [row for _, row in read_rows(tmp_path / "table.json")] == [{"a": 1}, {"a": 2}]
    assert [row for _, row in read_rows(tmp_path / "lines.json")] == [{"a": 1}, {"a": 2}]
    assert [row for _, row in read_rows(tmp_path / "one.json")] == [{"a": 1}]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b"a,b\n1\n", r"a.csv:2: this row does not have the 2 columns"),
        ("a.csv", b"a,b\n1,2,3\n", r"a.csv:2: this row does not have"),
        ("a.csv", b'text,b\n1,2\n"1,2\n', r"a.csv:3: not CSV: unexpected end of data in the row that begins here"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"a.csv:1: two columns are called 'a'"),
        ("a.csv", "prompt,completion\n".encode("utf-16-le"), r"a.csv:1: not UTF-8 text: save the file as UTF-8"),
        ("a.csv", b"prompt,completion\na,b\nGr\xfc\xdfe,c\n", r"a.csv:3: not UTF-8 text"),
        ("a.csv", b"prompt,completion\na,\n", r"a.csv:2: the answer is empty"),
        ("a.json", b"3", "must hold a list"),
        ("a.json", b"[1,\n2,\n}", "not JSON: .* at line 3"),
        ("a.parquet", b"PAR1", "is not Parquet"),
        ("a.jsonl.gz", b"no", "cannot be read"),
        ("a.jsonl", b'"x"\n' * 9000 + b"\xff", r"a.jsonl:9001: not UTF-8 text|no known format"),
        ("a.txt", b"x\n" * 9000 + b"\xff", r"a.txt:9001: not UTF-8 text"),
        ("a.jsonl", b'{"a":\n1}', r"a.jsonl:1: not JSON: .*; write each example on one line\n"),
        ("a.md", b"# Notes", r"a.md:1: not JSON: .*end the file's name in its format: \.jsonl"),
        ("a.jsonl", b'{"prompt": "x", "completion": "\\ud83d"}', r"a.jsonl:1: half a character"),
        ("a.jsonl", b'{"prompt": "x", "chosen": "y", "rejected": "z"}', r"data.columns = .* completion = 'chosen'"),
        ("a.jsonl", b"\n \n", "has no examples"),
        ("a.csv", b"", "has no examples"),
        ("a.json", b"", "has no examples"),
        ("a.jsonl", b'{"text": 3}', "'text' must be text, not a number"),
        ("a.jsonl", b'{"text": " "}', "the text is empty"),
        ("a.jsonl", b'{"prompt": "x", "completion": null}', "'completion' is empty"),
        ("a.jsonl", b'{"prompt": "x", "completion": 1}', "not a number; data.prompt and data.answer make text"),
        ("a.jsonl", b'{"instruction": "x", "output": "y", "history": [["z"]]}', "history must be a list of"),
        ("a.jsonl", b'{"conversations": [{"from": "robot", "value": "x"}]}', "role 'robot' is not one of system, user"),
        ("a.jsonl", b'{"conversations": [{"from": "human", "value": "x"}]}', "the last message is the user's"),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}', "nothing to learn"),
        ("a.jsonl", b'{"text": "x", "label": 1}', "has the columns text, label.*data.prompt = .* and data.answer = "),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    """A file that cannot be learned from is one sentence with the place and the reason."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=told):
        read_chats(tmp_path / name)


FRAGMENTS = [
    *(
        '{"messages": [',
        '{"role": "user", "content": "x"}',
        '{"role": "assistant", "content": "y"}',
        "]}",
        ",",
        "\n",
        "[",
        "{",
    ),
    *(
        '{"text": "x"}',
        '{"prompt": 1, "completion": null}',
        '{"conversations": [{"from": []}]}',
        '"',
        "1e999",
        "\0",
        "\ufeff",
    ),
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join),
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz"]),
)
def test_any_file_is_data_or_refused(tmp_path: Path, text: str, suffix: str) -> None:
    """No file makes reading data end in anything but chats or BadData."""
    path = tmp_path / f"any{suffix}"
    path.write_text(text, encoding="utf-8")
    told = str(path)
    try:
        assert read_chats(path)
    except BadData as error:
        told = str(error)
    assert str(path) in told


# -- formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ROWS)
def test_formats_are_recognised_and_learned_alike(tmp_path: Path, format_: str) -> None:
    """A question and its answer in any format give the same tokens; a plain text is learned whole, with its end."""
    path = write_rows(tmp_path / "a.jsonl", [ROWS[format_]])
    tokenised = tokenise_all(read_chats(path), byte_tokenizer(), 512)
    wanted = "hy? so<|im_end|>" if format_ == "text" else "so<|im_end|>"

    assert recognise(ROWS[format_], "x") == format_
    assert learned(tokenised) == [[wanted]]


SAID = {  # a message -> what is wrong with it
    '{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}': "a call is {",
    '{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}': "only the assistant calls tools",
    '{"role": "user", "content": "a", "images": ["b.jpg"]}': "a message has images: only text is supported",
    '{"role": "user", "content": [{"type": "image_url"}]}': "a content has a part 'image_url': only text",
    '{"role": "user", "content": ["a"]}': 'a part of a content is {"type": "text"',
    '{"role": "user", "content": null}': "needs a role and a content",
    '{"role": "assistant", "content": "a", "train": false}': '"train": false: write "weight": 0',
    '{"role": "user", "content": "a", "reasoning_content": "b"}': "thoughts (reasoning_content) are text, and the",
}


@pytest.mark.parametrize("message", SAID)
def test_nothing_of_a_message_is_dropped_in_silence(message: str) -> None:
    """Broken calls, pictures, others' thoughts and other tools' marks of what is learned are refused, with why."""
    answer = {"role": "assistant", "content": "yes"}
    with pytest.raises(BadData, match=re.escape(SAID[message])):
        read_chat({"messages": [json.loads(message), answer]}, "here", "messages")


def test_parts_turns_and_marks_of_other_tools() -> None:
    """OpenAI's parts are one text, Alpaca's history are turns, Dolly's context is input, ShareGPT's weights count."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]}
    assert read_chat(asked, "", "messages").texts == ["ab", "c"]
    row = {"instruction": "do", "context": "this", "response": "c", "history": [["a", "b"]], "system": "s"}
    assert recognise(row, "") == "alpaca"
    said = [(message["role"], message["content"]) for message in read_chat(row, "", "alpaca").messages]
    assert said == [*(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "do\n\nthis"), ("assistant", "c"))]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}, {"from": "gpt", "value": "c"}]
    chat = read_chat({"conversations": turns}, "", "sharegpt")
    assert [is_learned(message) for message in chat.messages] == [False, False, True]


@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}])
def test_a_column_without_text_is_reported(value: Any) -> None:
    """What has no text is never learned as Python spells it."""
    data = Data(train=(), prompt="{text}", answer="{label}")
    assert read_chat({"text": 1.5, "label": 3}, "here", "columns", data).texts == ["1.5", "3"]
    with pytest.raises(BadData, match=r"here: the column 'label' (is empty|holds several values)"):
        read_chat({"text": "a", "label": value}, "here", "columns", data)


def test_columns_make_an_example(tmp_path: Path) -> None:
    """Templates put any columns together; one that names a column that is not there says which there are."""
    write_rows(tmp_path / "train.csv", [{"text": f"it is {i}", "label": "good"} for i in range(9)])
    changes = ["data.train=train.csv", "data.prompt=Good or bad? {text}", "data.answer={label}", "data.test_share=0"]
    first = read_data(recipe_with(tmp_path, *changes)).train[0]

    assert [message["content"] for message in first.messages] == ["Good or bad? it is 0", "good"]
    with pytest.raises(BadData, match=r"train.csv:2: there is no column 'lable', the columns are text, label"):
        read_data(recipe_with(tmp_path, *changes, "data.answer={lable}"))


def test_the_format_can_be_said(tmp_path: Path) -> None:
    """A row that fits two formats is read as the recipe says."""
    write_rows(tmp_path / "train.jsonl", [{**ROWS["messages"], **ROWS["text"]}] * 3)
    kinds = {f: read_data(recipe_with(tmp_path, f"data.format={f}", "data.test_share=0")) for f in ("auto", "text")}

    assert kinds["auto"].train[0].text is None
    assert kinds["text"].train[0].text == "why? so"
    assert kinds["text"].notes[0] == "train: train.jsonl, 3 examples, text"
    assert kinds["text"].notes[1].startswith("train: columns that are not used: messages (3 of 3 examples)")


# -- what is learned -------------------------------------------------------------------------------

TURNS = Chat("x:1", (*chat("one?", "first")["messages"], *chat("two?", "second")["messages"]))
# answers of earlier turns lose their thoughts, as Qwen3's template has it
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHIFTING = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("loss_on", "wanted"),
    [("answer", ["first<|im_end|>", "second<|im_end|>"]), ("last_answer", ["second<|im_end|>"])],
)
def test_what_is_learned_of_a_conversation(loss_on: str, wanted: list[str]) -> None:
    """Of several turns every answer or the last is learned, each with its end, without marks in the template."""
    assert learned(tokenise_all([TURNS], byte_tokenizer(), 512, loss_on=loss_on)) == [wanted]


def test_all_can_be_learned() -> None:
    """`loss_on = "all"` learns every token but the first, which nothing predicts."""
    (example,) = tokenise_all([TURNS], byte_tokenizer(), 512, loss_on="all").examples

    assert example.spans == ((1, len(example.ids)),)


def test_a_message_of_weight_zero_is_not_learned() -> None:
    """OpenAI's `weight` on an answer takes it out of the loss."""
    messages = tuple({**m, "weight": 0} if m["content"] == "first" else m for m in TURNS.messages)

    assert learned(tokenise_all([Chat("x", messages)], byte_tokenizer(), 512)) == [["second<|im_end|>"]]


def test_a_template_that_rewrites_earlier_answers() -> None:
    """Each answer is an example of its own where earlier ones are written otherwise, behind what the server sends."""
    rewritten = tokenise_all([TURNS], byte_tokenizer(FORGETFUL), 512)
    assert learned(rewritten) == [["<think></think>first<|im_end|>"], ["<think></think>second<|im_end|>"]]
    assert rewritten.divided == ["x:1"]
    assert learned(tokenise_all([TURNS], byte_tokenizer(SHIFTING), 512)) == [["first<|im_end|>"], ["second<|im_end|>"]]


def test_a_template_that_refuses() -> None:
    """What a template raises is reported with the place of the example."""
    with pytest.raises(BadData, match="x:1: the base's chat template refuses this chat: no system please"):
        tokenise_all([TURNS], byte_tokenizer("{{ raise_exception('no system please') }}"), 512)


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=2, max_size=6)
)
def test_exactly_the_answers_are_learned(texts: list[str]) -> None:
    """Whatever is said in however many turns, the learned tokens decode to the answers and their ends, and no more."""
    texts = texts[: len(texts) // 2 * 2]
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))
    tokenised = tokenise_all([Chat("x", messages)], byte_tokenizer(), 100_000)

    assert learned(tokenised) == [[f"{text}<|im_end|>" for text in texts[1::2]]]


def test_a_base_without_chat_template(tmp_path: Path) -> None:
    """Prompts with answers and texts are written as they are; chats are refused, with what to set."""
    tokenizer = byte_tokenizer(None)
    pairs = read_chats(write_rows(tmp_path / "a.jsonl", [ROWS["alpaca"]]))
    chats = read_chats(write_rows(tmp_path / "b.jsonl", [ROWS["messages"]]))
    (example,) = tokenise_all(pairs, tokenizer, 512).examples

    assert tokenizer.decode(example.ids) == "why?so<|im_end|>"
    assert learned(tokenise_all(pairs, tokenizer, 512)) == [["so<|im_end|>"]]
    with pytest.raises(InputError, match=r"no chat template.*data\.template = 'plain'"):
        tokenise_all(chats, tokenizer, 512)
    assert learned(tokenise_all(chats, tokenizer, 512, template="plain")) == [["so<|im_end|>"]]
    with pytest.raises(InputError, match="several turns"):
        tokenise_all([TURNS], tokenizer, 512, template="plain")


# -- length ----------------------------------------------------------------------------------------


def test_longer_examples_are_counted(tmp_path: Path) -> None:
    """An example that is too long is an error, cut or left out, as the recipe says, and told in numbers."""
    long = chat("q" * 90, "a" * 50)
    chats = [
        Chat(f"x:{i}", tuple(row["messages"])) for i, row in enumerate((chat("q", "a"), long, chat("q" * 500, "a")))
    ]
    tokenizer = byte_tokenizer()
    cut = tokenise_all(chats, tokenizer, 140, too_long="truncate")
    left = tokenise_all(chats, tokenizer, 140, too_long="skip")

    assert [len(example.ids) for example in cut.examples] == [len(left.examples[0].ids), 140]
    assert (cut.cut, cut.skipped, left.skipped) == (["x:1"], ["x:2"], ["x:1", "x:2"])
    assert all(example.num_labels for example in cut.examples)
    assert "cut to 140 tokens (data.max_length): 1 example, the longest has 5" in cut.notes()[0]
    assert "left out" in cut.notes()[1]
    with pytest.raises(BadData, match=r"x:1 has \d+ tokens, at most 140 are read \(2 of 3 examples are too long"):
        tokenise_all(chats, tokenizer, 140)
    with pytest.raises(BadData, match=r"no example has anything to learn within 20 tokens, the shortest of 2 "):
        tokenise_all(chats[1:], tokenizer, 20, too_long="truncate")


def test_texts_are_cut_in_pieces() -> None:
    """A plain text longer than the limit is learned in pieces, none of it lost."""
    tokenised = tokenise_all([Chat("x", text="abc" * 100)], byte_tokenizer(), 64)

    assert b"".join(bytes(byte_tokenizer().decode(e.ids), "utf-8") for e in tokenised.examples).startswith(b"abc" * 100)
    assert tokenised.num_pieces == len(tokenised.examples) == 5


def test_control_tokens_in_a_text_are_reported() -> None:
    """A text that spells an end of turn would teach to stop there, so it is said."""
    chats = [Chat(f"x:{i}", tuple(chat("q", answer)["messages"])) for i, answer in enumerate(("a", "a <|im_end|> b"))]
    (note,) = tokenise_all(chats, byte_tokenizer(), 512).notes()

    assert note.startswith("the messages of 1 example contain control tokens")
    assert note.endswith("x:1")
