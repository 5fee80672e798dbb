"""The request log over HTTP: who asks for it, what is in a record, and what may be given of an answer."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.data.answer_log import log_files
from adapterhub_local.data.from_log import Wanted, rows_of_log
from adapterhub_local.data.logged import Asked
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry
from adapterhub_local.settings import home as home_at
from serve.options import HttpOptions
from tests.serve.conftest import Server
from tests.serve.logging_server import CHAT, WEATHER, Logging


@pytest.fixture(scope="module")
def logging(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logging]:
    """One that logs what asks for it."""
    running = Logging(built_base, tmp_path_factory.mktemp("asked"))
    yield running
    running.server.stop()


@pytest.fixture(scope="module")
def logging_all(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logging]:
    """One that logs all chats."""
    running = Logging(built_base, tmp_path_factory.mktemp("all"), request_log_all=True)
    yield running
    running.server.stop()


def test_a_record_says_all_about_an_answer(logging: Logging) -> None:
    """Who asked what of which weights, how it was sampled and what came; the answer's header names its id."""
    asked = CHAT | {"model": "alpha", "store": True, "metadata": {"ticket": "7"}, "seed": 5, "tools": [WEATHER],
                    "tool_choice": "required", "max_tokens": 200, "user": "somebody"}  # fmt: skip
    response = logging.post("/v1/chat/completions", asked)
    answer, record = response.json(), logging.records()[-1]
    assert response.headers["x-qhub-logged"] == record["id"] == answer["id"]
    assert (record["key"], record["request_id"]) == (logging.key, response.headers["x-request-id"])
    assert logging.token not in json.dumps(logging.records())
    assert (record["model"], record["adapter"]) == ("alpha", "alpha@1")
    assert (record["digest"], record["base"]["name"]) == (response.headers["x-qhub-digest"], "tiny")
    assert record["base"]["fingerprint"].startswith("sha256:")
    assert (record["messages"], record["tools"]) == (asked["messages"], [WEATHER])
    assert record["parameters"] | {"seed": 5, "temperature": 0, "tool_choice": "required"} == record["parameters"]
    assert record["metadata"] == {"ticket": "7"}
    usage = answer["usage"]
    assert (record["prompt_tokens"], record["completion_tokens"]) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    (choice,), (given,) = record["choices"], answer["choices"]
    (call,) = given["message"]["tool_calls"]
    function = {"name": "weather", "arguments": json.loads(call["function"]["arguments"])}
    assert choice["message"]["tool_calls"] == [{"id": call["id"], "type": "function", "function": function}]
    assert choice["finish_reason"] == given["finish_reason"] == "tool_calls"


def test_streams_and_several_choices_are_logged_alike(logging: Logging) -> None:
    """The same request, streamed or not, leaves the same record but for its ids and times."""
    asked = CHAT | {"store": True, "n": 2, "seed": 1, "temperature": 1}
    whole = logging.post("/v1/chat/completions", asked)
    streamed = logging.post("/v1/chat/completions", asked | {"stream": True})
    one, two = logging.records()[-2:]
    assert json.loads(streamed.text.partition("data: ")[2].partition("\n")[0])["id"] == two["id"]
    texts = [choice["message"]["content"] for choice in whole.json()["choices"]]
    assert [choice["message"]["content"] for choice in one["choices"]] == texts
    for own in ("id", "time", "request_id"):
        assert one.pop(own) != two.pop(own)
    assert one == two


def test_nothing_else_is_logged(logging: Logging) -> None:
    """Not without store = true, not by the store of /v1/responses, no answer that failed, no text to continue."""
    before = len(logging.records())
    for changes in ({}, {"store": False}, {"metadata": {"a": "b"}}, {"stream": True}):
        response = logging.post("/v1/chat/completions", CHAT | changes)
        assert (response.status_code, "x-qhub-logged" in response.headers) == (200, False)
    ask = {"model": "tiny", "input": "Hi", "max_output_tokens": 4}
    assert logging.post("/v1/responses", ask | {"store": True}).json()["store"] is True
    assert logging.post("/v1/responses", ask).status_code == 200
    assert logging.post("/v1/messages", CHAT).status_code == 200
    assert logging.post("/v1/completions", {"model": "tiny", "prompt": "Hi", "store": True}).status_code == 200
    assert logging.post("/v1/chat/completions", CHAT | {"model": "nobody", "store": True}).status_code == 404
    assert len(logging.records()) == before


def test_all_chats_are_logged_where_their_operator_wants_it(logging_all: Logging) -> None:
    """Those of all three APIs, each by the id that its client sees; what its sender noted for others is left out."""
    responses = [
        logging_all.post("/v1/chat/completions", CHAT | {"metadata": {"list": [1]}}),
        logging_all.post("/v1/responses", {"model": "tiny", "input": "Hi", "store": False, "max_output_tokens": 4}),
        logging_all.post("/v1/messages", CHAT),
        logging_all.post("/api/chat", {"model": "tiny", "messages": CHAT["messages"], "stream": False}),
    ]
    records = logging_all.records()[-4:]
    for response, record in zip(responses, records, strict=True):
        assert response.headers["x-qhub-logged"] == record["id"] == response.json().get("id", record["id"])
        assert (record["messages"], record["is_asked"]) == (CHAT["messages"], False)
        assert logging_all.rate(record["id"], rating=1).status_code == 200
    services, http = logging_all.server.services, logging_all.server.service.http
    services.apply(replace(http, request_log_all=False))  # as SIGHUP does
    assert "x-qhub-logged" not in logging_all.post("/v1/chat/completions", CHAT).headers
    services.apply(replace(http, request_log_all=True))
    assert records[0]["metadata"] is None
    assert "16 keys" in records[0]["metadata_left_out"]


def test_feedback_is_of_the_key_that_asked(logging: Logging) -> None:
    """An answer of another key is as unknown as none, to be found out by nobody; the last feedback counts."""
    answer_id = logging.post("/v1/chat/completions", CHAT | {"store": True}).json()["id"]
    for wrong, token in ((answer_id, logging.other), ("chatcmpl-none", None), ("\x00\x1b[2J\n", None), ("../..", None)):
        response = logging.rate(wrong, token, rating=1)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
        assert "store = true" in response.json()["error"]["message"]
    assert logging.rate(answer_id, rating=1).json() == {
        "id": answer_id, "object": "feedback", "choice": 0, "rating": 1.0, "is_corrected": False
    }  # fmt: skip
    text = "Bell \x07, escape \x1b, \u2028, \x85, \\ and half a \U0001f600"
    assert logging.rate(answer_id, correction=text, comment="\x00", metadata={"who": "me"}).status_code == 200
    record = logging.records()[-1]
    assert (record["rating"], record["correction"]["content"]) == (None, text)
    assert (record["comment"], record["metadata"]) == ("\x00", {"who": "me"})
    rows = rows_of_log(logging.folder, Asked(), Wanted()).lines
    assert [json.loads(row)["messages"][-1]["content"] for row in rows].count(text) == 1


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"rating": -1}, "rating"),
        ({"rating": 2}, "rating"),
        ({"rating": "good"}, "rating"),
        ({"rating": True}, "rating"),
        ({}, "rating"),
        ({"comment": ""}, "rating"),
        ({"correction": " "}, "correction"),
        ({"correction": {"role": "user", "content": "Hi"}}, "correction"),
        ({"correction": {"role": "assistant", "content": None}}, "correction"),
        ({"correction": []}, "correction"),
        ({"comment": "x" * 10_001}, "comment"),
        ({"rating": 1, "stars": 5}, "stars"),
        ({"rating": 1, "choice": 2}, "choice"),
        ({"rating": 1, "choice": -1}, "choice"),
        ({"rating": 1}, "choice"),
        ({"rating": 1, "choice": 0, "metadata": {"a": 1}}, "metadata"),
        ({"rating": 1, "choice": 0, "metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"rating": 1, "choice": 0, "metadata": {"a": "x" * 3_900_000}}, "metadata"),
        ({"rating": 1, "id": "x" * 3_900_000}, "id"),
        ({"rating": 1, "id": ""}, "id"),
    ],
)
def test_feedback_that_cannot_be_is_refused(given: dict, param: str, logging: Logging) -> None:
    """By the name of what is wrong, and nothing of it is written."""
    answer_id = logging.post("/v1/chat/completions", CHAT | {"store": True, "n": 2}).json()["id"]
    before = len(logging.records())
    response = logging.post("/v1/feedback", {"id": answer_id} | given)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert len(response.content) < 1000
    assert len(logging.records()) == before


def test_metadata_that_is_to_be_logged_is_bounded(logging: Logging) -> None:
    """4 MB of it are refused where they would be written, before the model computes anything."""
    before = len(logging.records())
    huge = {"metadata": {"a": "x" * 3_900_000}}
    refused = logging.post("/v1/chat/completions", CHAT | huge | {"store": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "metadata")
    assert logging.post("/v1/chat/completions", CHAT | huge).status_code == 200
    assert len(logging.records()) == before


def test_a_server_without_a_log_takes_store_and_refuses_feedback(server: Server) -> None:
    """As before there was one; feedback is refused with the way out."""
    response = server.http.post("/v1/chat/completions", json=CHAT | {"store": True, "metadata": {"a": [1]}})
    assert (response.status_code, "x-qhub-logged" in response.headers) == (200, False)
    refused = server.http.post("/v1/feedback", json={"id": response.json()["id"], "rating": 1})
    assert refused.status_code == 404
    assert "--request-log" in refused.json()["error"]["message"]
    with pytest.raises(InputError, match="--request-log FOLDER"):
        HttpOptions(request_log_all=True)


def test_a_log_that_cannot_be_written_breaks_no_answer(built_base: Path, tmp_path: Path) -> None:
    """Answers come as ever, /metrics counts what is lost, and feedback is not confirmed that nobody keeps."""
    logging = Logging(built_base, tmp_path)
    asked = CHAT | {"store": True}
    kept = logging.post("/v1/chat/completions", asked).json()["id"]
    assert logging.rate(kept, rating=1).status_code == 200
    shutil.rmtree(logging.folder)
    logging.folder.write_text("in the way")
    lost = [logging.post("/v1/chat/completions", asked | {"stream": stream}) for stream in (False, True)]
    assert [response.status_code for response in lost] == [200, 200]
    assert logging.rate(lost[0].json()["id"], rating=1).status_code == 404
    logging.folder.unlink()
    assert logging.rate(kept, rating=1).status_code == 404
    again = logging.post("/v1/chat/completions", asked).json()["id"]
    assert logging.rate(again, rating=0).status_code == 200
    metrics = logging.server.http.get("/metrics", headers={"Authorization": f"Bearer {logging.token}"}).text
    assert 'qhub_request_log_records_total{kind="answer"} 2.0' in metrics
    assert 'qhub_request_log_lost_total{kind="answer"} 2.0' in metrics
    logging.server.stop()


def test_a_server_that_starts_again_knows_its_answers(built_base: Path, tmp_path: Path) -> None:
    """What was logged before may be rated; every answer that was given is on disk when the server has stopped."""
    before = Logging(built_base, tmp_path)
    ids = [before.post("/v1/chat/completions", CHAT | {"store": True}).json()["id"] for _ in range(5)]
    before.server.stop()
    http = HttpOptions(request_log=tmp_path / "log")
    server = Server(load_base(read_record(built_base), device="cpu"), Registry(home_at(tmp_path / "home")), http=http)
    bearer = {"Authorization": f"Bearer {before.token}"}
    for answer_id in ids:
        rated = server.http.post("/v1/feedback", json={"id": answer_id, "rating": 0.5}, headers=bearer)
        assert rated.status_code == 200, rated.text
    server.stop()
    rows = [json.loads(row) for path in log_files(tmp_path / "log") for row in path.read_bytes().splitlines()]
    assert [row["kind"] for row in rows] == ["answer"] * 5 + ["feedback"] * 5
