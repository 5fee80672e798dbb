"""From an answer to the next adapter: asked, rated, corrected, made into rows, trained."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.main import qhub
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.train.train import train
from serve.options import HttpOptions
from tests.chats import INSTRUCTION, RECIPE
from tests.serve.conftest import Server


def from_log(log: Path, out: Path, *options: str) -> dict:
    """What `qhub data from-log` reports."""
    done = CliRunner().invoke(qhub, ["data", "from-log", str(log), "--out", str(out), "--json", *options])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


@pytest.mark.parametrize(
    ("form", "objective", "rows"), [("messages", "sft", 16), ("preference", "dpo", 16), ("judged", "kto", 32)]
)
def test_answers_become_an_adapter(
    form: str, objective: str, rows: int, tiny_base: BaseInfo, home: Home, tmp_path: Path
) -> None:
    """The official client asks with store = true, its answers are corrected, and what training reads of that are the
    very messages: it trains by each kind of objective, and the lineage has the file's digest."""
    server = Server(load_base(tiny_base, device="cpu"), Registry(home), http=HttpOptions(request_log=tmp_path / "log"))
    asked = []
    for number in range(16):
        question = INSTRUCTION + "ab"[number % 2] * (number % 5 + 1 + number)
        reply = server.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": question}], max_tokens=16, store=True,
            metadata={"number": str(number)}, stream=number % 3 == 0,
            extra_body={"structured_outputs": {"choice": ["perhaps", "surely"]}},
        )  # fmt: skip
        answer_id = {chunk.id for chunk in reply}.pop() if number % 3 == 0 else reply.id
        correction = "yes" if number % 2 == 0 else "no"
        if number % 4:
            server.http.post("/v1/feedback", json={"id": answer_id, "correction": correction}).raise_for_status()
        else:  # the official client, too
            server.client.post("/feedback", body={"id": answer_id, "correction": correction}, cast_to=object)
        asked.append((question, correction))
    server.stop()

    report = from_log(tmp_path / "log", tmp_path / "train.jsonl", "--as", form)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace('test = "test.jsonl"\n', ""))
    changes = [f"train.objective={objective}", *(["train.learning_rate=1e-3"] if objective != "sft" else [])]
    checked = CliRunner().invoke(qhub, ["recipe", "check", str(recipe), *(f"--set={change}" for change in changes)])
    version = train(load_recipe(recipe, changes), home)

    assert checked.exit_code == 0, checked.output
    assert (report["rows"], report["format"], report["left_out"]) == (rows, form, {})
    assert [source["adapter"] for source in report["answers_of"]] == [None]
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    if form == "messages":
        assert [tuple(m["content"] for m in line["messages"]) for line in lines] == asked
    assert [data["digest"] for data in version.lineage["data"] if data["role"] == "train"] == [report["digest"]]
