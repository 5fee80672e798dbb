"""Small chat files to train on."""

import json
from pathlib import Path

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
