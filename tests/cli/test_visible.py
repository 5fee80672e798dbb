"""What others wrote never reaches the terminal as something it obeys: every verb, every field, errors too."""

import ast
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.cli.main import run
from adapterhub_local.draw.curve import loss_panel, svg
from adapterhub_local.registry import Registry
from adapterhub_local.train.report import write_report
from adapterhub_local.visible import visible, visible_json, visible_line
from tests.stores import files

CLI = Path(__file__).parents[2] / "adapterhub_local" / "cli"
HOSTILE = {
    "CSI": "\x1b[31mred\x1b[2J", "OSC": "\x1b]0;title\x07", "C1": "\x9b31m", "return": "a\rFORGED", "line": "a\nFORGED",
    "bidi": "\u202edeyalp", "isolate": "\u2066x", "separator": "a\u2028FORGED", "width": "a\u200bb", "DEL": "a\x7f",
    "form feed": "a\x0cFORGED", "next line": "a\x85FORGED", "tag": "a\U000e0041", "backspace": "ab\x08c",
}  # fmt: skip
OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)


def lineage(text: str, number: int = 0) -> dict[str, Any]:
    """A lineage with `text` in every field that a verb may show."""
    score = {"exact_match": 0.5, "loss": 1.0, "rows": 2}
    return {
        "kind": text, "task": text, "description": text, "seed": text,
        "base": {"name": text, "fingerprint": text, "hub_id": text, "revision": text, "architecture": text},
        "adapter": {"rank": 2, "alpha": 4.0, "num_parameters": 8, "target_modules": [text]},
        "recipe": {"text": f"x = {text}{number}", "digest": f"{text}{number}", "train": {text: f"{text}{number}"}},
        "data": [{"role": text, "file": f"{text}{number}", "rows": 7, "digest": text}],
        "merge": {"method": f"{text}{number}", text: number},
        "parents": [{"reference": text, "weight": 0.5, "manifest_digest": text, "content_digest": text}],
        "environment": {text: text}, "training": {"optimizer": f"{text}{number}"},
        "metrics": {text: {"adapter": score, "base": score, "data": text}},
        "compatibility": {"level": text, "base_model": text},
    }  # fmt: skip


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code and both streams of `qhub`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(list(arguments))
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def is_tame(text: str) -> bool:
    """Whether nothing in it is obeyed, and no line of it was written by others."""
    return not OBEYED.search(text) and not any(line.strip().startswith("FORGED") for line in text.splitlines())


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_is_shown_of_a_version_is_tame(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every verb that shows versions, for people and as JSON that still holds the very same text."""
    registry = Registry()
    for number in range(2):
        registry.publish("a", files(number), lineage(text, number))
    verbs = (
        "list",
        "list a",
        "show a",
        "lineage a",
        "lineage a --dot",
        "lineage a --mermaid",
        "search x",
        "diff a@1 a@2",
    )
    for verb in verbs:
        code, out, err = call(capsys, *verb.split())
        assert (code == 0, is_tame(out + err)) == (True, True), (verb, out, err)
    for verb in ("list --json", "show a --json", "diff a@1 a@2 --json"):
        code, out, err = call(capsys, *verb.split())
        assert (code == 0, is_tame(out + err)) == (True, True), verb
        assert json.dumps(text)[1:-1] in json.dumps(json.loads(out)), verb


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_errors_and_notes_are_tame(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was typed, or is in a recipe, comes back in errors; a key's note in a table: none of it as it was."""
    recipe = tmp_path / "recipe.toml"
    key = json.dumps(text)
    recipe.write_text(f"{key} = 1\n[train]\n{key} = 2\nepochs = {key}\n[{key}]\nx = 1\n", encoding="utf-8")
    calls = (
        ("show", text), ("show", f"a@{text}"), (text,), ("list", "--metric", text), ("list", f"--{text}"),
        ("recipe", "check", str(recipe)), ("recipe", "show", str(recipe)), ("train", str(recipe), "--set", f"{text}=1"),
        ("recipe", "check", f"{tmp_path}/{text}.toml"), ("remote", "add", text, "s3://b/x"),
        ("remote", "add", "r", f"s9://{text}"), ("sync", text),
        ("base", "show", text), ("alias", "set", "a", text, "1"), ("push", "a", text), ("pull", text), ("import", text),
        ("key", "revoke", text), ("runs", "show", text), ("merge", text, "--weights", "1", "--name", "m"),
    )  # fmt: skip
    for arguments in calls:
        code, out, err = call(capsys, *arguments)
        assert (code in (1, 2), is_tame(out + err)) == (True, True), (arguments, err)
        assert all(line.startswith("qhub: ") for line in err.splitlines()), err
    assert call(capsys, "key", "create", "--note", text)[0] == 0
    code, out, err = call(capsys, "key", "list")
    assert (code == 0, is_tame(out + err)) == (True, True)
    assert json.loads(call(capsys, "key", "list", "--json")[1])[0]["note"] == text


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_pages_and_pictures_are_tame(text: str) -> None:
    """The report of a run and the drawing of a curve hold neither controls nor markup from elsewhere."""
    text += "<script>alert(1)</script>"
    said = lineage(text)
    said["training"] |= {"steps": 1, "examples": 1, "seconds": 1.0, "tokens_per_second": 1.0, "compute": text}
    said["adapter"]["num_modules"] = 1
    page = write_report(text, said, [], [dict.fromkeys(("prompt", "wanted", "base", "adapter"), text)])
    picture = svg([loss_panel([(1, 1.0), (2, 0.5)])], text)
    for written in (page, picture):
        assert not OBEYED.search(written)
        assert "<script" not in written


@given(st.text())
def test_visible_text_keeps_its_meaning(text: str) -> None:
    """Nothing obeyed is left, what had a shape stays, lines stay lines, and JSON means the same."""
    assert not OBEYED.search(visible(text))
    assert not {"\n", "\t"} & set(visible_line(text))
    shaped = "".join(letter for letter in text if unicodedata.category(letter)[0] in "LNPSM")
    assert visible(shaped) == shaped
    assert json.loads(visible_json(json.dumps(text, ensure_ascii=False))) == text
    assert not OBEYED.search(visible_json(json.dumps(text, ensure_ascii=False)))


def test_letters_of_all_languages_stay() -> None:
    """Words with joiners, marks and emoji are what they were."""
    for text in ("größer\u00a0als", "می\u200cخواهم", "क्\u200dष", "👩\u200d💻", "日本\u3000語", "a\tb\nc"):
        assert visible(text) == text
        assert visible(text + "\r\n") == text + "\n"


def test_every_verb_prints_through_the_one_place() -> None:
    """No file of the command line calls click's, rich's or Python's own print; `output` alone does."""
    for path in sorted(CLI.glob("*.py")):
        if path.name == "output.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("click.echo", "click.secho", "print", "Console", "sys.stdout.write"), path.name
