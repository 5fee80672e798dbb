"""Calls of tools as a metric: what the server reads in an answer, beside what it reads in the reference."""

import json
from pathlib import Path

import pytest

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.tool_format import HERMES, LLAMA, PROMPTED, ToolFormat
from adapterhub_local.cli.main import run
from adapterhub_local.evaluate.tool_calls import Offer, call_hits, read_calls
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.chats import RECIPE

NAMES = ("lamp", "timer")


def call(name: str = "lamp", **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


ON = call(to="on")
X, Y = ({"type": "function", "function": {"name": name, "parameters": {}}} for name in "xy")


@pytest.mark.parametrize(
    ("written", "wanted", "valid", "tool", "exact"),
    [
        (ON, ON, 1, 1, 1),
        (f"Sure.\n{ON}\n", ON, 1, 1, 1),  # words around a call are words
        (f"<think>{call('timer')}</think>\n\n{ON}", ON, 1, 1, 1),  # thoughts call nothing
        ('<tool_call>{"arguments":{"to":"on"},"name":"lamp"}</tool_call>', ON, 1, 1, 1),  # spelled otherwise
        (call(to="off"), ON, 1, 1, 0),
        (call(to="on", also=1), ON, 1, 1, 0),
        (call(), ON, 1, 1, 0),
        (call("timer", to="on"), ON, 1, 0, 0),
        (ON + "\n" + ON, ON, 1, 0, 0),
        (ON + "\n" + call("timer"), call("timer") + "\n" + ON, 1, 1, 1),  # in any order
        (call("oven", to="on"), ON, 0, 0, 0),  # not offered: the server takes it for text
        (ON[:-14], ON, 0, 0, 0),  # never closed
        (ON.replace("}}", "}"), ON, 0, 0, 0),  # not JSON
        (f"{ON}\n{call('oven')}", ON, 0, 0, 0),  # one of two is broken
        ('<tool_call>{"name": "lamp", "arguments": "on"}</tool_call>', ON, 0, 0, 0),  # no object
        ('{"name": "lamp", "arguments": {"to": "on"}}', ON, 0, 0, 0),  # no marks
        ("The lamp is on.", ON, 0, 0, 0),
        ("", ON, 0, 0, 0),
        ("It is noon.", "It is 12.", 1, 1, 1),  # nothing to call, and nothing called
        (ON, "It is 12.", 0, 0, 0),
        ("<tool_call>", "It is 12.", 0, 0, 0),
    ],
)
@pytest.mark.parametrize("tool_format", [HERMES, PROMPTED], ids=["hermes", "told"])
def test_what_counts(tool_format: ToolFormat, written: str, wanted: str, valid: int, tool: int, exact: int) -> None:
    """The form, the tools, the arguments: each asks for the one before it."""
    hits = call_hits([written], [wanted], [Offer(tool_format, NAMES)])
    assert hits == {"valid_calls": (bool(valid),), "right_tools": (bool(tool),), "exact_calls": (bool(exact),)}


def test_a_form_without_marks() -> None:
    """Where a call is the whole answer, a JSON object that is no call is a broken one."""
    offer = Offer(LLAMA, NAMES)
    assert read_calls('{"name": "lamp", "parameters": {"to": "on"}}', offer).calls == (("lamp", '{"to": "on"}'),)
    assert not read_calls('{"name": "oven", "parameters": {}}', offer).is_valid
    assert read_calls("It is noon.", offer).is_valid


def test_rows_without_tools_do_not_count() -> None:
    """Nobody can call there: such rows are in no share."""
    hits = call_hits([ON, "Hi"], [ON, "Hello"], [Offer(PROMPTED, NAMES), None])
    assert hits["exact_calls"] == (True,)


def rows(count: int) -> list[dict]:
    """Requests for a tool with one call, which is learned soon; the last offers no tools."""
    made = []
    for number in range(count):
        function = {"name": "x", "arguments": "{}"}
        answer = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
        made.append({"messages": [{"role": "user", "content": f"Call {number}"}, answer], "tools": [X]})
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    return [*made[:-1], {"messages": plain}]


def recipe_at(folder: Path) -> Path:
    for name, count in (("train", 8), ("test", 4)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    (folder / "recipe.toml").write_text(RECIPE.replace("[eval]", "[eval]\ntool_calls = true\nmax_new_tokens = 60"))
    return folder / "recipe.toml"


def test_a_run_and_an_evaluation_score_calls(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both score base and adapter, and say the same of the same answers."""
    with pytest.raises(SystemExit):
        run(["train", str(recipe_at(tmp_path)), "--set", "train.epochs=40", "--set", "train.schedule=constant"])
    printed, version = capsys.readouterr().out, Registry(home).resolve("yes-no")
    trained = version.lineage["metrics"]["yes-no"]
    report = next(home.runs.glob("*/report.html")).read_text()
    with pytest.raises(SystemExit) as exit_info:
        run(["eval", "yes-no", "--data", str(tmp_path / "test.jsonl"), "--against", "base", "--tool-calls",
             "--max-new-tokens", "60", "--task", "again"])  # fmt: skip
    out = capsys.readouterr().out
    kept = Registry(home).metrics(version)["again"]

    assert exit_info.value.code == 0
    assert trained["base"]["valid_calls"] == 0, "a random model that calls would prove nothing"
    assert trained["adapter"]["valid_calls"] > 0
    for name in ("valid_calls", "right_tools", "exact_calls"):
        assert trained["adapter"][name] == kept["adapter"][name]
        assert name in trained["adapter"]["intervals"]
        assert name in report
        assert f"{name.replace('_', ' ')} 0.0% -> " in printed
        assert f"yes-no@1 minus base, {name.replace('_', ' ')}: +" in out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["train.objective=dpo"], "eval.tool_calls is for rows with one answer"),
        (["eval.tool_calls=false"], "eval.max_new_tokens is for eval.tool_calls = true"),
        (["data.test=plain.jsonl"], "needs held-out examples that offer tools, in the column 'tools': none of them"),
        (["data.test=other.jsonl"], "other.jsonl:1: the answer calls 'x', which is not among the tools of the row"),
    ],
)
def test_wrong_use(
    tiny_base: BaseInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], told: str
) -> None:
    """`qhub recipe check` says what is wrong in one sentence, with exit code 2."""
    path, made = recipe_at(tmp_path), rows(4)
    (tmp_path / "plain.jsonl").write_text(json.dumps(made[-1]) + "\n")
    (tmp_path / "other.jsonl").write_text(
        json.dumps({**made[0], "tools": [{"type": "function", "function": {"name": "y"}}]}) + "\n"
    )
    with pytest.raises(SystemExit) as exit_info:
        run(["recipe", "check", str(path), *(word for change in changes for word in ("--set", change))])
    err = capsys.readouterr().err

    assert exit_info.value.code == 2
    assert told in err
