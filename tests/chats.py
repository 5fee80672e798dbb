"""Small chat files to train on."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

from adapterhub_local.recipe import Recipe, load_recipe
from adapterhub_local.rows.examples import Tokenised
from tests.tiny import byte_tokenizer

INSTRUCTION = "Say yes for a and no for b.\n\n"


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_chats(path: Path, count: int = 16, offset: int = 0) -> Path:
    """A JSONL file of `count` chats with one instruction, different texts and two answers."""
    rows = [chat(INSTRUCTION + "ab"[i % 2] * (i % 5 + 1 + offset), "yes" if i % 2 == 0 else "no") for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RECIPE = """
[base]
name = "tiny"

[data]
train = "train.jsonl"
test = "test.jsonl"

[adapter]
rank = 4
alpha = 8

[train]
epochs = 2
batch_size = 8
learning_rate = 1e-2

[eval]
samples = 0

[output]
name = "yes-no"
"""


def write_recipe(folder: Path, text: str = RECIPE, count: int = 16) -> Path:
    """A recipe for the base `tiny` with its two data files beside it."""
    write_chats(folder / "train.jsonl", count)
    write_chats(folder / "test.jsonl", 6, offset=1)
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as the file type that the suffix names."""
    name = path.name.removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
        return path
    if name.endswith(".parquet"):
        import pyarrow
        from pyarrow.parquet import write_table

        write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return path


def recipe_with(folder: Path, *changes: str) -> Recipe:
    """A recipe in `folder` without a test file, changed."""
    (folder / "recipe.toml").write_text(RECIPE.replace('test = "test.jsonl"\n', ""))
    if not (folder / "train.jsonl").exists():
        write_chats(folder / "train.jsonl", 40)
    return load_recipe(folder / "recipe.toml", changes)


def learned(tokenised: Tokenised) -> list[list[str]]:
    """The texts that are learned of each example."""
    tokenizer = byte_tokenizer()
    return [[tokenizer.decode(e.ids[start:end]) for start, end in e.spans] for e in tokenised.examples]
