"""Rows are accounted for: every column used, named or refused, bad rows counted, and files of every shape read."""

import bz2
import contextlib
import gc
import gzip
import json
import lzma
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc, parquet

from adapterhub_local.data.chat import check_chat
from adapterhub_local.data.dataset import read_data, read_parts
from adapterhub_local.data.files import read_rows
from adapterhub_local.data.formats import read_chat
from adapterhub_local.errors import BadData
from adapterhub_local.recipe.schema import Data
from adapterhub_local.recipe.source import local_files
from tests.chats import chat, recipe_with, write_rows

PAIR = {"prompt": "a", "completion": "b"}
TALK = chat("a", "b")


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"question": "a", "context": "c", "answer": "b"}, "context"),
        ({**TALK, "id": 3, "source": "x", "nothing": None}, "id, source"),
        ({"messages": [{**TALK["messages"][0], "timestamp": 1}, TALK["messages"][1]]}, "messages.timestamp"),
        ({**PAIR, "score": 0.5}, "score"),
        ({"text": "a b", "url": "x"}, "url"),
        ({**PAIR, "label": True}, None),
        ({"instruction": "a", "input": "c", "output": "b", "system": "s"}, None),
    ],
)
def test_columns_are_used_or_named(tmp_path: Path, row: dict[str, Any], unused: str | None) -> None:
    """A column that is not part of the chat is named, with how many examples have it."""
    (part,) = read_parts([write_rows(tmp_path / "a.jsonl", [row, row])], "train")
    notes = part.notes[1:]

    assert len(notes) == (unused is not None)
    for name in (unused or "").split(", ") if unused else ():
        assert f"{name} (2 of 2 examples)" in notes[0]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({**PAIR, "label": False}, "judged bad"),
        ({**TALK, "kto_tag": False}, "judged bad"),
        ({**TALK, "images": ["a.jpg"]}, "the column images is not empty, and only text"),
        ({**TALK, "audios": ["a.wav"]}, "the column audios is not empty, and only text"),
        ({**TALK, "chosen": "x", "rejected": "y"}, "these are preferences"),
        ({**TALK, "tools": [3]}, "a tool is"),
        (
            {"system": "x", "messages": [{"role": "system", "content": "y"}, *TALK["messages"]]},
            "another one in a column",
        ),
    ],
)
def test_what_would_be_lost_is_refused(row: dict[str, Any], told: str) -> None:
    """Judgements, media and broken tools are refused with the reason, in whatever format they come."""
    kind = "messages" if "messages" in row else "prompt-completion"
    with pytest.raises(BadData, match=told):
        read_chat(row, "here", kind)


BAD = [
    TALK,
    {"messages": [*TALK["messages"], {"role": "user", "content": "thanks"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
    {"messages": [*TALK["messages"], {"role": "user", "content": "bye"}]},
    chat("a", "ok"),
    chat(" ", "ok"),
]


def test_all_trouble_is_counted_at_once(tmp_path: Path) -> None:
    """Every kind of mistake is reported in one go, with its count and first place, and can be left out."""
    path = write_rows(tmp_path / "train.jsonl", BAD)
    path.write_text(path.read_text() + "not JSON\n")
    with pytest.raises(BadData) as caught:
        read_data(recipe_with(tmp_path, "data.test_share=0"))
    first, second, third, fourth, total = str(caught.value).splitlines()

    assert first.endswith(
        "train.jsonl:2: the last message is the user's, and must be the assistant's answer (2 examples)"
    )
    assert second.endswith("train.jsonl:3: the answer is empty")
    assert "train.jsonl:6: the prompt is empty" in third
    assert "train.jsonl:7: not JSON" in fourth
    assert total == "train.jsonl: 5 of 7 examples cannot be used: data.bad_rows = 'skip' leaves them out"
    kept = read_data(recipe_with(tmp_path, "data.test_share=0", "data.bad_rows=skip"))
    assert len(kept.train) == 2
    assert kept.records[0]["left_out"] == 5
    assert "2 of 7 examples left out (data.bad_rows): the last message is the user's" in kept.notes[1]


MAP = pyarrow.map_(pyarrow.string(), pyarrow.string())
ROW = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "tool_calls": json.dumps([{"function": {"name": "f", "arguments": "{}"}}])}
TOOL = {"type": "function", "function": json.dumps({"name": "f", "parameters": "{}"})}


def maps(tables: list[dict[str, str]]) -> list[list[tuple[str, str]]]:
    return [list(table.items()) for table in tables]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_maps_are_tables(tmp_path: Path, suffix: str) -> None:
    """A column of Arrow's type map holds what a table would: messages and tools are read from it."""
    talk, tools = maps([ROW, ANSWER]), maps([TOOL])
    twice = [[("role", "user"), ("role", "assistant")]]
    table = pyarrow.table(
        {"messages": pyarrow.array([talk, twice, talk], pyarrow.list_(MAP)),
         "tools": pyarrow.array([tools] * 3, pyarrow.list_(MAP)),
         "meta": pyarrow.array([[("x", "1")]] * 3, MAP)},
    )  # fmt: skip
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    with pytest.raises(BadData, match=r"example 2: a map has a key twice, .* \(1 of 3 examples"):
        read_parts([path], "train")
    (part,) = read_parts([path], "train", Data(train=(), bad_rows="skip"))

    assert part.record["unused"] == ["meta"]
    for one in part.chats:
        assert one.messages[0] == ROW
        assert one.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
        assert one.tools[0]["function"] == {"name": "f", "parameters": {}}


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
def test_compressed_files(tmp_path: Path, pack: Any) -> None:
    """bz2 and xz are unpacked, and what is not what its name says is refused."""
    suffix = {"bz2": ".bz2", "lzma": ".xz"}[pack.__module__]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(b'{"prompt": "a", "completion": "b"}\n'))
    assert [row for _, row in read_rows(path)] == [PAIR]
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(BadData, match="cannot be"):
        list(read_rows(path))


def test_zstandard_files(tmp_path: Path) -> None:
    """Zstandard is unpacked where its package is there."""
    zstandard = pytest.importorskip("zstandard", reason="the package zstandard is not installed")
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"prompt": "a", "completion": "b"}\n'))
    assert [row for _, row in read_rows(path)] == [PAIR]
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(BadData, match="cannot be unpacked"):
        list(read_rows(path))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_are_read_to_their_end(tmp_path: Path, suffix: str) -> None:
    """Files put one behind another are all read, and one that breaks off, wherever, is refused."""
    pack: Callable[[bytes], bytes] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(
        suffix
    ) or pytest.importorskip("zstandard", reason="the package zstandard is not installed").compress
    path, line = tmp_path / f"a.jsonl{suffix}", json.dumps(PAIR).encode() + b"\n"
    path.write_bytes(pack(line * 3) + pack(line) + pack(line * 2))
    assert [row for _, row in read_rows(path)] == [PAIR] * 6
    whole = pack(line * 2000)
    for kept in (len(whole) - 1, len(whole) // 2, 8):
        path.write_bytes(pack(line) + whole[:kept])
        with pytest.raises(BadData, match="cannot be"):
            list(read_rows(path))


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_no_file_stays_open(suffix: str, tmp_path: Path) -> None:
    """Read to its end, left in the middle or broken: a data file is closed, however it is compressed."""
    pack: Callable[[bytes], bytes] = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(
        suffix
    ) or pytest.importorskip("zstandard", reason="the package zstandard is not installed").compress
    sound, broken = (tmp_path / f"{name}.jsonl{suffix}" for name in ("sound", "broken"))
    sound.write_bytes(pack(b'{"prompt": "a", "completion": "b"}\n' * 3))
    broken.write_bytes(b"nothing of the kind")
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always", ResourceWarning)
        assert len(list(read_rows(sound))) == 3
        rows = read_rows(sound)
        next(rows)
        rows.close()
        with contextlib.suppress(BadData):
            list(read_rows(broken))
        gc.collect()
    assert [str(one.message) for one in noted if issubclass(one.category, ResourceWarning)] == []


def test_folders_and_patterns(tmp_path: Path) -> None:
    """A folder gives its data files, of several splits those of the role; a pattern those whose names it matches."""
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in ("train-1.jsonl", "train-2.jsonl", "test.jsonl"):
        write_rows(folder / name, [PAIR])
    (folder / "README.md").write_text("about")

    assert [path.name for path in local_files(folder, "train")] == ["train-1.jsonl", "train-2.jsonl"]
    assert [path.name for path in local_files(folder, "test")] == ["test.jsonl"]
    assert [path.name for path in local_files(folder / "*-2.jsonl", "train")] == ["train-2.jsonl"]
    assert len(read_data(recipe_with(tmp_path, "data.train=parts", "data.test=parts/te*.jsonl")).train) == 2
    weighted = read_data(recipe_with(tmp_path, "data.train=parts", "data.weights=[2]", "data.test_share=0"))
    assert len(weighted.train) == 4


def save_to_disk(folder: Path) -> None:
    """A folder as `datasets.Dataset.save_to_disk` writes it: an Arrow stream with its features in the schema."""
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["bad", "good"], "_type": "ClassLabel"},
    }
    table = pyarrow.table({"text": ["x", "y"], "label": [0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder.mkdir(parents=True)
    with ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{}")


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    """What `datasets` saves to disk is read, and its own names of a column's numbers are used."""
    save_to_disk(tmp_path / "one")
    save_to_disk(tmp_path / "split" / "train")
    (tmp_path / "split" / "dataset_dict.json").write_text("{}")
    changes = ("data.prompt={text}?", "data.answer={label}", "data.test_share=0")

    for name in ("one", "split"):
        found = read_data(recipe_with(tmp_path, f"data.train={name}", *changes))
        assert [one.messages[-1]["content"] for one in found.train] == ["bad", "good"]
        assert "label: 0 is 'bad', 1 is 'good', as the file itself says" in found.notes[1]


@pytest.mark.parametrize(
    "header", ['"prompt";completion', "prompt|completion", "prompt, completion", "prompt^completion"]
)
def test_csv_of_any_delimiter(tmp_path: Path, header: str) -> None:
    """The delimiter is the one outside of quotes, and blanks behind it are not part of the names."""
    mark = next(mark for mark in (";", "|", ", ", "^") if mark in header)
    (tmp_path / "a.csv").write_text(f"{header}\na{mark}b\n")

    assert [row for _, row in read_rows(tmp_path / "a.csv")] == [PAIR]


def test_a_delimiter_in_quotes_is_text(tmp_path: Path) -> None:
    """A comma inside a quoted name does not divide the columns."""
    (tmp_path / "a.csv").write_text('"prompt, long";completion\na;b\n')

    assert [row for _, row in read_rows(tmp_path / "a.csv")] == [{"prompt, long": "a", "completion": "b"}]


def test_keys_that_stand_twice(tmp_path: Path) -> None:
    """A key that a table of JSON has twice is refused: one of its values would be lost."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "prompt": "c", "completion": "b"}\n')
    with pytest.raises(BadData, match=r"a.jsonl:1: the key 'prompt' occurs twice"):
        read_parts([tmp_path / "a.jsonl"], "train")


def test_messages_as_text() -> None:
    """Text that holds a list in JSON is that list, as CSV has no other way."""
    assert read_chat({"messages": json.dumps(TALK["messages"])}, "x", "messages").texts == ["a", "b"]


def test_keys_without_a_value_are_not_given() -> None:
    """Null is "not given": files that went through Arrow have every key in every message."""
    messages = [
        {"role": "user", "content": "a", "weight": None, "tool_calls": None},
        {"role": "assistant", "content": "b", "weight": None, "reasoning_content": None},
    ]
    assert check_chat(messages, "x").messages == tuple(TALK["messages"])


@pytest.mark.parametrize("role", ["developer", "human", "gpt", "model", "chatgpt", "observation"])
def test_roles_of_elsewhere(role: str) -> None:
    """Roles that other tools have are known; others are said with data.roles."""
    assert check_chat([{"role": role, "content": "x"}, *TALK["messages"]], "x").messages[0]["role"] != role
    with pytest.raises(BadData, match=r"data\.roles"):
        check_chat([{"role": "visitor", "content": "x"}, *TALK["messages"]], "x")
    known = check_chat([{"role": "visitor", "content": "x"}, *TALK["messages"]], "x", {"visitor": "user"})
    assert known.messages[0]["role"] == "user"


def test_columns_under_other_names(tmp_path: Path) -> None:
    """`data.columns` says what the data call their columns and the keys of their turns."""
    row = {"dialog": [{"speaker": "user", "said": "a"}, {"speaker": "agent", "said": "b"}]}
    write_rows(tmp_path / "train.jsonl", [row] * 3)
    columns = "data.columns={messages='dialog', role='speaker', content='said'}"
    found = read_data(recipe_with(tmp_path, columns, "data.roles={agent='assistant'}", "data.test_share=0"))

    assert found.train[0].messages == tuple(TALK["messages"])


@pytest.mark.parametrize("labels", [("no", "yes"), {"0": "no", "1": "yes"}])
def test_numbers_have_names(labels: Any) -> None:
    """`data.labels` says what numbers mean; a number without a name is refused."""
    data = Data(train=(), prompt="{text}", answer="{label}", labels={"label": labels})
    for value in (1, True, "1", 1.0):
        assert read_chat({"text": "a", "label": value}, "x", "columns", data).texts == ["a", "yes"]
    with pytest.raises(BadData, match="the column 'label' is 2"):
        read_chat({"text": "a", "label": 2}, "x", "columns", data)


def test_braces_are_text() -> None:
    """Doubled braces, and braces around what cannot be a column's name, are braces."""
    row = {"text": "a", "json": '{"x": 1}'}
    for prompt in ('Give {{"city": ...}}: {text}', 'Give {"city": ...}: {text}'):
        data = Data(train=(), prompt=prompt, answer="{json}")
        assert read_chat(row, "x", "columns", data).texts == ['Give {"city": ...}: a', '{"x": 1}']


def test_calls_of_llama_factory() -> None:
    """ShareGPT's function_call and observation are the assistant's call and the tool's result."""
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "b"},
    ]
    found = read_chat({"conversations": turns, "tools": '[{"name": "f"}]'}, "x", "sharegpt")

    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert found.tools == ({"type": "function", "function": {"name": "f"}},)
