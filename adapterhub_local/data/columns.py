"""The columns of a row: what they are called, which format they are, and which of them a chat holds."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from adapterhub_local.data.chat import KEPT, THOUGHTS, TOOLS
from adapterhub_local.data.hints import ANSWERED, ASKED, way_on
from adapterhub_local.data.json_text import parsed
from adapterhub_local.data.preferences import JUDGED, is_judged, is_preference, used_columns
from adapterhub_local.errors import BadData
from adapterhub_local.recipe import objectives
from adapterhub_local.recipe.schema import Data

PAIRS = (  # the usual ones first, where a row has several
    *(("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response")),
    *(("prompt", "answer"), ("input", "output"), ("inputs", "targets"), ("query", "answers")),
    *(("input_text", "output_text"), ("text_input", "output")),  # Vertex AI's and AI Studio's
    *((asked, answered) for asked in ASKED for answered in ANSWERED),
)
SYSTEM = ("system", "system_prompt")
KNOWN = {"messages", "conversations", "instruction", "text", *TOOLS, *SYSTEM, *ASKED, *ANSWERED}
IN_TURNS = {"role", "content", "from", "value", "train", "training", "tool_calls", "function_call", *KEPT, *THOUGHTS}
COLUMN = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
_USED = {
    "messages": {"messages", "choices", *TOOLS, *SYSTEM},
    "sharegpt": {"conversations", *TOOLS, *SYSTEM},
    "alpaca": {"instruction", "history", *TOOLS, *SYSTEM},
    "prompt-completion": {*TOOLS, *SYSTEM},
    "text": {"text"},
}


def listed(columns: Iterable[Any]) -> str:
    """Names of columns for people, in quotes where one holds a comma."""
    return ", ".join(f"'{name}'" if "," in str(name) or not str(name).strip() else str(name) for name in columns)


def renamed(row: Any, data: Data | None) -> Any:
    """The row with its columns called as they are here, where a recipe says what they are called.

    A list of messages is a row of them, and names of columns that only differ in capitals are known.
    """
    if isinstance(row, list) and row and all(isinstance(turn, Mapping) for turn in row):
        row = {"conversations" if "from" in row[0] else "messages": row}
    if not isinstance(row, Mapping):
        return row
    if any(value != value for value in row.values()):  # NaN, by which pandas says that there is none
        row = {key: None if value != value else value for key, value in row.items()}
    if not (data and (data.prompt is not None or data.columns)) and not KNOWN & row.keys():
        row = {str(key).lower() if str(key).lower() in KNOWN else key: value for key, value in row.items()}
    if not (data and data.columns):
        return row
    ours = {theirs: name for name, theirs in data.columns.items()}
    named = {ours.get(key, key): value for key, value in row.items()}
    inner = {theirs: name for theirs, name in ours.items() if name in ("role", "content")}
    for key in ("messages", "conversations", "prompt", "completion") if inner else ():
        turns = parsed(named.get(key))
        if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
            named[key] = [{inner.get(name, name): value for name, value in turn.items()} for turn in turns]
    return named


def recognise(row: Any, where: str, shape: str = objectives.ANSWERS) -> str:
    """The format of a row, from the names of its columns. Raises BadData if it is none of them, or of another shape."""
    columns = row.keys() if isinstance(row, Mapping) else ()
    if shape == objectives.ANY:
        shape = objectives.PAIRS if is_preference(row) else objectives.ANSWERS
    if shape != objectives.ANSWERS:
        if is_preference(row):
            return "preference"
        if shape == objectives.JUDGED and set(JUDGED) & set(columns):
            return "judged"
        wanted = "chosen and rejected" + (", or an answer and label" if shape == objectives.JUDGED else "")
        hint = ": train.objective = 'kto' learns from answers with a label" if is_judged(row) else ""
        raise BadData(
            f"{where}: this objective needs the columns {wanted}; the example has {listed(columns)}"
            + (hint or "; data.columns says what they are called")
        )
    check_preferences(row, where)
    if "messages" in columns:
        return "messages"
    if "conversations" in columns:
        return "sharegpt"
    if "instruction" in columns and {"output", "response"} & set(columns):
        return "alpaca"
    if any({left, right} <= set(columns) for left, right in PAIRS):
        return "prompt-completion"
    if "text" in columns and not {"label", "labels", "role"} & set(columns):
        return "text"
    has = f"has the columns {listed(columns)}" if columns else "is not a table"
    raise BadData(f"{where}: not a known format, the example {has}: {way_on(row)}")


def unused_columns(row: Mapping[str, Any], format: str, data: Data | None = None) -> list[str]:  # noqa: A002
    """The columns of a row with a value that its chat does not hold; keys of its messages as `messages.id`."""
    given = {str(key) for key, value in row.items() if value not in (None, "", [], {})}
    if format == "columns":
        assert data is not None, "the templates are the recipe's"
        templates = (data.prompt or "", data.answer or "", data.system or "")
        return sorted(given - {match[1] for text in templates for match in COLUMN.finditer(text)})
    if format == "preference":
        return sorted(given - used_columns(row))
    if format == "judged":
        format = answer_format(row, "")  # noqa: A001
        given -= set(JUDGED)
    used = set(_USED[format]) | {key for key in JUDGED if isinstance(row.get(key), bool)}
    if format == "alpaca":
        used |= {beside(row), answer_column(row)}
    if format == "prompt-completion":
        used |= set(next((pair for pair in PAIRS if pair[0] in row and pair[1] in row), ()))
    unused = given - used
    for name in ("messages", "conversations"):
        turns = parsed(row.get(name)) if name in used else None
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, Mapping):
                unused |= {
                    f"{name}.{key}"
                    for key, value in turn.items()
                    if value not in (None, "", [], {}) and key not in IN_TURNS
                }
    return sorted(unused)


def check_preferences(row: Any, where: str) -> None:
    if isinstance(row, Mapping) and row.get("chosen") is not None and row.get("rejected") is not None:
        chosen = parsed(row["chosen"])
        is_whole = isinstance(chosen, list) and len(chosen) > 1
        ours = "messages" if is_whole else "output" if "instruction" in row else "completion"
        raise BadData(
            f"{where}: these are preferences (chosen, rejected): set train.objective = 'dpo' to learn from both, or "
            f"data.columns = {{ {ours} = 'chosen' }} to learn the chosen answers"
        )


def answer_format(row: Any, where: str) -> str:
    """The format of a judged row without its judgement."""
    return recognise({key: value for key, value in row.items() if key not in JUDGED}, where)


def beside(row: Mapping[str, Any]) -> str:
    return "input" if "input" in row else "context"


def answer_column(row: Mapping[str, Any]) -> str:
    return "output" if "output" in row else "response"
