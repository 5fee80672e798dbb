"""Every form in which preferences are written gives the same conversation with the same two answers."""

import json
from pathlib import Path

import pytest

from adapterhub_local.data.dataset import read_parts
from adapterhub_local.errors import BadData
from adapterhub_local.recipe.schema import Data

ASK, GOOD, BAD = "What is it?", "A cat.", "A dog."
USER = {"role": "user", "content": ASK}
ANSWERS = [{"role": "assistant", "content": GOOD}, {"role": "assistant", "content": BAD}]
FORMS = {
    "texts": {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
    "messages": {"prompt": [USER], "chosen": [ANSWERS[0]], "rejected": [ANSWERS[1]]},
    "implicit prompt": {"chosen": [USER, ANSWERS[0]], "rejected": [USER, ANSWERS[1]]},
    "prompt twice": {"prompt": ASK, "chosen": [USER, ANSWERS[0]], "rejected": [USER, ANSWERS[1]]},
    "messages as JSON text": {"chosen": json.dumps([USER, ANSWERS[0]]), "rejected": json.dumps([USER, ANSWERS[1]])},
    "hh-rlhf": {
        "chosen": f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {BAD}",
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": ASK}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "alpaca": {"instruction": ASK, "input": "", "chosen": GOOD, "rejected": BAD},
    "openai": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [ANSWERS[0]],
        "non_preferred_output": [ANSWERS[1]],
    },
    "gemini": {
        "contents": [{"role": "user", "parts": [{"text": ASK}]}],
        "completions": [
            {"score": 0, "completion": {"role": "model", "parts": [{"text": BAD}]}},
            {"score": 1, "completion": {"role": "model", "parts": [{"text": GOOD}]}},
        ],
    },
    "question": {"question": ASK, "chosen": GOOD, "rejected": BAD},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_pairs(tmp_path: Path, form: str) -> None:
    """The prompt, the chosen answer and the rejected one are found wherever a row has them."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(FORMS[form]))
    ((chat,),) = (part.chats for part in read_parts([path], "train", shape="pairs"))

    assert [message["content"] for message in chat.messages] == [ASK, GOOD]
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.rejected is not None
    assert chat.rejected["content"] == BAD


@pytest.mark.parametrize(
    ("form", "columns"),
    [
        ("texts", {"completion": "chosen"}),
        ("messages", {"completion": "chosen"}),
        ("openai", {"completion": "chosen"}),
        ("question", {"completion": "chosen"}),
        ("alpaca", {"output": "chosen"}),
        ("implicit prompt", {"messages": "chosen"}),
        ("prompt twice", {"messages": "chosen"}),
        ("messages as JSON text", {"messages": "chosen"}),
    ],
)
def test_the_way_to_learn_chosen_answers(tmp_path: Path, form: str, columns: dict[str, str]) -> None:
    """What the refusal of pairs by sft says to write reads their prompt with the chosen answer."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(FORMS[form]))
    with pytest.raises(BadData) as caught:
        read_parts([path], "train")
    (part,) = read_parts([path], "train", Data(train=(), columns=columns))

    ((ours, theirs),) = columns.items()
    assert f"data.columns = {{ {ours} = '{theirs}' }}" in str(caught.value)
    assert [message["content"] for message in part.chats[0].messages] == [ASK, GOOD]


def test_texts_that_hold_their_prompt(tmp_path: Path) -> None:
    """Two texts are split behind the words that both begin with."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": "The sky is blue.", "rejected": "The sky is black."}))
    ((chat,),) = (part.chats for part in read_parts([path], "train", shape="pairs"))

    assert [message["content"] for message in chat.messages] == ["The sky is", "blue."]
    assert chat.rejected == {"role": "assistant", "content": "black."}


@pytest.mark.parametrize(
    ("row", "is_good"),
    [
        ({"prompt": ASK, "completion": GOOD, "label": True}, True),
        ({"prompt": ASK, "completion": GOOD, "label": 0}, False),
        ({"prompt": [USER], "completion": [ANSWERS[0]], "label": False}, False),
        ({"messages": [USER, ANSWERS[0]], "label": True}, True),
        ({"messages": [USER, ANSWERS[0]], "kto_tag": False}, False),
    ],
)
def test_forms_of_judged_answers(tmp_path: Path, row: dict, is_good: bool) -> None:
    """An answer with a label, in any form of one answer."""
    path = tmp_path / "judged.jsonl"
    path.write_text(json.dumps(row))
    ((chat,),) = (part.chats for part in read_parts([path], "train", shape="judged"))

    assert [message["content"] for message in chat.messages] == [ASK, GOOD]
    assert chat.is_good is is_good


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Else?", "chosen": [USER, ANSWERS[0]], "rejected": [USER, ANSWERS[1]]}, "other messages than the"),
        ({"chosen": [USER, *ANSWERS], "rejected": [USER, ANSWERS[1]]}, "chosen has 2 messages after"),
        ({"prompt": ASK, "chosen": 7, "rejected": BAD}, "chosen must be text, a message or a list"),
        ({"prompt": ASK, "chosen": "", "rejected": BAD}, "chosen: the answer is empty"),
        *(
            ({"instruction": ASK, "history": earlier, "chosen": GOOD, "rejected": BAD}, "history must be a list of")
            for earlier in ("once", [["a"]], [["a", "b", "c"]], {"a": 1}, [["a", 1]])
        ),
    ],
)
def test_pairs_that_are_none(tmp_path: Path, row: dict, message: str) -> None:
    """Answers to different prompts, or to none, are refused with file and line."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(BadData, match=message):
        read_parts([path], "train", shape="pairs")


def test_unused_columns_are_named(tmp_path: Path) -> None:
    """Scores and sources beside the answers are named as unused."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({**FORMS["texts"], "score_chosen": 9.0, "source": "x"}))
    (part,) = read_parts([path], "train", shape="pairs")

    assert any("columns that are not used: score_chosen (1 of 1 examples), source" in note for note in part.notes)
