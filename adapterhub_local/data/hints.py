"""What to do with a row of no known format: what its columns hold says which keys of a recipe would make it one."""

import re
from collections.abc import Mapping
from typing import Any

from adapterhub_local.data.json_text import parsed
from adapterhub_local.errors import BadData

ASKED, ANSWERED = ("prompt", "question", "query", "input"), ("completion", "response", "answer", "output")
_ANSWERS = re.compile(r"answer|reference|solution|target|expected|truth|completion|response|output|gold")
WRITE = (
    'write {"messages": [{"role": "user", "content": ...}, ...]}, say with data.columns what these are called, '
    "or with data.prompt and data.answer how columns make an example"
)


def way_on(row: Any) -> str:
    """A hint for this row, after the sentence that says which columns it has."""
    if not isinstance(row, Mapping):
        return WRITE
    for column, value in row.items():
        turns = parsed(value)
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, Mapping) and {"role", "content"} <= set(first):
            return f"data.columns = {{ messages = '{column}' }} says that it holds the messages"
        if isinstance(first, Mapping) and {"from", "value"} <= set(first):
            return f"data.columns = {{ conversations = '{column}' }} says that it holds the turns"
    columns = set(map(str, row))
    if "role" in columns and columns & {"text", "content"}:
        return "each row is one message: put the messages of a conversation into one row, as a list in messages"
    if "input_ids" in columns:
        return "these are token ids, of a tokenizer that need not be the base's: give the text"
    label = next((name for name in ("label", "labels") if name in columns), None)
    if label and "text" in columns:
        made = f"data.prompt = '{{text}}' and data.answer = '{{{label}}}'"
        return f"{made} make an example of them, and data.labels gives numbers their names"
    texts = {str(column) for column, value in row.items() if isinstance(value, str)}
    for known, ours in ((ANSWERED, "prompt"), (ASKED, "completion")):
        if texts & set(known) and len(others := texts - set(known)) == 1:  # one side of a pair by its name
            (column,) = others
            return f"data.columns = {{ {ours} = '{column}' }} says that it is the {ours}"
    return WRITE


def check_answered(row: Mapping[str, Any], where: str) -> None:
    """Raise BadData for messages that end with a question whose answer is in a column beside them, as in rows for
    reinforcement fine-tuning, which are graded."""
    beside = {str(key): value for key, value in row.items() if key != "messages" and value not in (None, "", [], {})}
    name = next((key for key in beside if _ANSWERS.search(key.lower())), None)
    if name is None:
        return
    way = f"data.columns = {{ prompt = 'messages', completion = '{name}' }} takes it for the answer"
    if not isinstance(beside[name], str):
        way = f"write it as text, and {way}"
    raise BadData(
        f"{where}: the last message is the user's, as in rows for reinforcement fine-tuning, and the column '{name}' "
        f"says what is right: {way} (train.objective = 'sft' learns it, 'grpo' rewards it)"
    )


def kind_of(value: Any) -> str:
    """What a value is, for people."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list):
        return "a list (give each of several answers a row of its own)"
    return "a table" if isinstance(value, Mapping) else "bytes" if isinstance(value, bytes) else type(value).__name__
