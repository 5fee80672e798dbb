"""What a person types wrongly: every verb answers with one sentence that says what to write, and exit code 2."""

import os
from pathlib import Path

import pytest

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.cli.main import run
from adapterhub_local.registry import Registry
from tests.stores import LINEAGE, files

MISTYPED = [
    ("serve --base nobase", "there is no base 'nobase'"),
    ("serve tiny --port 8000", "the base is named by an option: qhub serve --base tiny"),
    ("serve --host no.such.host.invalid", "'no.such.host.invalid' has no address"),
    ("serve --host 0.0.0.0", "make one with `qhub key create`"),
    ("serve --lora-root nowhere", "nowhere is not a folder"),
    ("serve --port 99999", "not in the range"),
    ("chat --url 127.0.0.1:8000", "write it as http://127.0.0.1:8000"),
    ("chat --url ftp://x", "'ftp://x' is not a server's address"),
    ("chat --url http://127.0.0.1:99999", "is not a server's address"),
    ("chat --temperature 5", "not in the range"),
    ("key create --adapters ../*", "'../*' fits no name"),
    ("key create --adapters SQL*", "'SQL*' fits no name"),
    ("key create --expires 0d", "'0d' is not a time: write hours or days"),
    ("key create --rate 60", "'60' is not a rate"),
    ("key create --concurrency 0", "at least 1"),
    ("key revoke nothing", "there is no key 'nothing'"),
    ("alias split a canary=10,prod=90", "there is no alias a@canary"),
    ("alias split a prod=0", "not a split: write aliases with their shares"),
    ("alias split a@1 prod=1", "'a@1' is not a name"),
    ("alias split nobody prod=1", "there is no alias nobody@prod"),
    ("sync push nowhere a", "there is no remote 'nowhere'"),
    ("sync pull team b", "team has no 'b'"),
    ("sync push team a@1 --all", "--all takes a name"),
    ("sync pull team a@!", "'a@!' is not a reference"),
    ("sync pull team a --expect 1", "--expect is about an alias here: write a@ALIAS"),
    ("sync pull team a@prod", "team has no alias 'a@prod': `qhub sync push team a --alias prod` makes it"),
    ("sync push team a --expect 1", "--expect is about one alias of one NAME"),
    ("sync push team a b --alias prod --expect 1", "--expect is about one alias of one NAME"),
    ("sync push team a --alias latest", "'latest' is reserved"),
    ("sync push team a a@1 --alias prod", "--alias points to one version of a name"),
    ("sync push team a --alias prod --dry-run", "sends nothing, and moves nothing"),
    ("sync push team a --split prod", "'prod' is not a split"),
    ("sync status team nobody", "team has no 'nobody'"),
    ("sync log team nobody", "the log of team has no 'nobody'"),
    ("history nobody", "there is no adapter 'nobody', and never was"),
    ("history bb", "did you mean b?"),
    ("history nobody --json", "there is no adapter 'nobody', and never was"),
    ("history --after x", "qhub: 'x' is not a place in the history"),
    ("history --event rename", "qhub: 'rename' is not a kind of change"),
    ("sync log nowhere", "there is no remote 'nowhere'"),
    ("key publish team 00000000", "there is no key '00000000'"),
    ("key revoke 00000000 --remote team", "remote 'team' has no key '00000000'"),
    ("serve --remote nowhere", "there is no remote 'nowhere'"),
    ("serve --remote nowhere/at/all", "is not there: is its disk mounted?"),
    ("serve --limits http://host", "'http://host' is not a Redis URL"),
    ("remote add other file/below", "file/below cannot be made (Not a directory)"),
    ("merge a b", "Missing option '--weights'"),
    ("merge a b --weights 1", "give one weight for each, in order"),
    ("merge a b --weights 1,nan", "'nan' is not a weight"),
    ("merge a nobody --weights 1,1 --dry-run", "there is no adapter 'nobody'"),
    ("merge file a --weights 1,1 --dry-run", "file is not a safetensors file"),
    ("merge a b --weights 1,1 --method fast", "there is no merge method 'fast'"),
    ("import file", "file is not a tar in the OCI layout"),
    ("import nowhere.tar", "there is no file nowhere.tar"),
    ("import .", ". is a folder, not a tar of `qhub export --oci`"),
    ("export a", "name the file to write"),
    ("export nobody -o x.safetensors", "there is no adapter 'nobody'"),
    ("export a -o x", "x must end in .safetensors"),
    ("export a -o nowhere/x.safetensors", "nowhere does not exist: create the folder first"),
    ("export a --to peft -o file", "file exists already"),
]


@pytest.fixture
def place(tiny_base: BaseInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Path:
    """An empty folder but for a text file, a home with a base, two adapters, an alias and a remote."""
    registry = Registry()
    registry.publish("a", files(1), LINEAGE, alias="prod")
    registry.publish("b", files(2), LINEAGE)
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "file").write_text("text, and nothing else that anybody could read as an adapter")
    with pytest.raises(SystemExit):
        run(["remote", "add", "team", str(tmp_path / "remote")])
    capsys.readouterr()
    return folder


def test_one_sentence_and_exit_code_2(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written, nothing waits, and there is no traceback, whatever is wrong."""
    wrong = []
    for line, said in MISTYPED:
        with pytest.raises(SystemExit) as caught:
            run(line.split())
        captured = capsys.readouterr()
        sentences = captured.err.strip().splitlines()
        is_told = len(sentences) == 1 and sentences[0].startswith("qhub: ") and said in sentences[0]
        if caught.value.code != 2 or not is_told or captured.out:
            wrong.append((line, caught.value.code, captured))
    assert wrong == []
    assert sorted(os.listdir(place)) == ["file"]
    assert {str(version) for version in Registry().versions()} == {"a@1", "b@1"}
