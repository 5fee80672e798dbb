"""Stored answers of /v1/responses: what goes on from them, what their key alone sees, and how many are kept."""

import json
import tracemalloc
from pathlib import Path

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import NotFound
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from serve.answers.stored import SECONDS, StoredResponses
from serve.options import HttpOptions
from serve.requests.responses import MessageItem, ResponsesRequest
from tests.serve.conftest import Server

ASK = {"model": "alpha", "max_output_tokens": 12, "temperature": 0}
FIRST = {"role": "user", "content": "Hello"}
MORE = {"role": "user", "content": "More"}


def reference(item: object) -> dict:
    """A reference to an item of an answer."""
    return {"type": "item_reference", "id": item.id}


def test_what_goes_on_from_a_stored_answer_is_the_whole_conversation(server: Server) -> None:
    """By previous_response_id or by references, over two turns, streamed or not: the same prompt, the same answer."""
    ask = server.client.responses.create
    first = ask(**ASK, input=[FIRST])
    assert first.store is True
    given_back = [item.model_dump() for item in first.output]
    whole = ask(**ASK, input=[FIRST, *given_back, MORE])
    by_id = ask(**ASK, input="More", previous_response_id=first.id)
    by_reference = ask(**ASK, input=[FIRST, *map(reference, first.output), MORE])
    events = list(ask(**ASK, input="More", previous_response_id=first.id, stream=True))
    streamed = events[-1].response
    for answer in (by_id, by_reference, streamed):
        assert answer.output_text == whole.output_text
        assert answer.usage.input_tokens == whole.usage.input_tokens
    assert (by_id.previous_response_id, whole.previous_response_id) == (first.id, None)

    third = [FIRST, *given_back, MORE, *[item.model_dump() for item in whole.output], FIRST]
    tokens = ask(**ASK, input=third).usage.input_tokens
    for before in (by_id, by_reference, streamed):
        assert ask(**ASK, input=[FIRST], previous_response_id=before.id).usage.input_tokens == tokens


def test_instructions_are_not_carried_over(server: Server) -> None:
    """As in OpenAI's API, each request gives its own."""
    ask = server.client.responses.create
    first = ask(**ASK, input="Hello", instructions="Be brief")
    plain = ask(**ASK, input=[FIRST, *[item.model_dump() for item in first.output], MORE])
    went_on = ask(**ASK, input="More", previous_response_id=first.id)
    assert went_on.usage.input_tokens == plain.usage.input_tokens


def test_calls_and_thoughts_are_stored_too(tool_server: Server) -> None:
    """A result answers the call of the stored answer before it."""
    schema = {"type": "object", "properties": {"place": {"enum": ["Rome", "Oslo"]}}, "required": ["place"]}
    tools = [{"type": "function", "name": "weather", "parameters": schema, "strict": False}]
    ask = {"model": "tiny", "max_output_tokens": 120, "tools": tools, "temperature": 0}
    first = tool_server.client.responses.create(**ask, input="Hello", tool_choice="required")
    (call,) = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}
    whole = tool_server.client.responses.create(**ask, input=[FIRST, call.model_dump(), result])
    for how in (
        {"input": [result], "previous_response_id": first.id},
        {"input": [FIRST, reference(call), result]},
    ):
        answer = tool_server.client.responses.create(**ask, **how)
        assert (answer.usage.input_tokens, answer.output_text) == (whole.usage.input_tokens, whole.output_text)


def test_what_is_stored_is_shown_and_deleted(server: Server) -> None:
    """The official client's retrieve, input_items and delete."""
    responses = server.client.responses
    first = responses.create(**ASK, input="Hello", metadata={"a": "b"})
    second = responses.create(**ASK, input=[MORE], previous_response_id=first.id)
    assert responses.retrieve(first.id).to_dict() == first.to_dict()
    shown = list(responses.input_items.list(second.id, order="asc", limit=1))  # follows the pages
    assert [item.content[0].text for item in shown] == ["Hello", first.output_text, "More"]
    assert shown[1].id == first.output[0].id
    assert [item.id for item in responses.input_items.list(second.id)] == [item.id for item in reversed(shown)]

    responses.delete(first.id)
    for gone in (responses.retrieve, responses.delete, responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="is stored"):
            gone(first.id)
    with pytest.raises(openai.BadRequestError, match="is stored") as error:
        responses.create(**ASK, input="More", previous_response_id=first.id)
    assert error.value.code == "previous_response_not_found"
    assert responses.create(**ASK, input="More", previous_response_id=second.id).status == "incomplete"
    with pytest.raises(openai.BadRequestError, match="is not an item"):
        responses.input_items.list(second.id, after="msg_nothing")


def test_what_is_not_to_be_stored_is_not(server: Server) -> None:
    """`store: false`, and an answer that failed."""
    answer = server.client.responses.create(**ASK, input="Hello", store=False)
    assert answer.store is False
    with pytest.raises(openai.NotFoundError):
        server.client.responses.retrieve(answer.id)
    number = len(server.service.stored._holders)
    with pytest.raises(openai.BadRequestError, match="context"):
        server.client.responses.create(**{**ASK, "max_output_tokens": 10**6}, input="Hello")
    assert len(server.service.stored._holders) == number


def test_an_id_stands_for_what_the_server_gave_it_to(server: Server) -> None:
    """A client's item with the id of a stored one does not take its place, and ids that it repeats are two items."""
    ask = server.client.responses.create
    first = ask(**ASK, input="Hello")
    said = first.output[0]
    ask(**ASK, input=[FIRST, {"id": said.id, "role": "assistant", "content": "something else"}, MORE])
    honest = ask(**ASK, input=[FIRST, said.model_dump(), MORE])
    referring = ask(**ASK, input=[FIRST, reference(said), MORE])
    assert referring.usage.input_tokens == honest.usage.input_tokens
    twice = ask(**ASK, input=[{"id": "x", **FIRST}, {"id": "x", **MORE}, FIRST])
    pages = server.client.responses.input_items.list(twice.id, limit=1, order="asc")
    assert [item.content[0].text for item in pages] == ["Hello", "More", "Hello"]


def test_what_a_later_answer_shares_outlives_it(server: Server) -> None:
    """An item of a stored answer can be referred to, though a newer answer that had it was deleted."""
    ask = server.client.responses.create
    first = ask(**ASK, input="Hello")
    server.client.responses.delete(ask(**ASK, input="More", previous_response_id=first.id).id)
    assert ask(**ASK, input=[FIRST, reference(first.output[0]), MORE]).usage.input_tokens > 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"user": "\ud800"}, "user"),
        ({"metadata": {"a": "x\udfff"}}, "metadata"),
        ({"metadata": {"\ud800": "x"}}, "metadata"),
        ({"input": [{"type": "function_call_output", "call_id": "\ud800", "output": "x"}]}, "input"),
        ({"input": [{**FIRST, "id": "\ud800"}]}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "\ud800", "schema": {}}}}, "text"),
        ({"instructions": "\ud800"}, "instructions"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_half_a_character_is_refused(server: Server, change: dict, param: str, stream: bool) -> None:
    """It could neither be given back nor stored: a 400 before anything runs, wherever it stands."""
    body = json.dumps({**ASK, "input": "Hello", "stream": stream, **change})
    answer = server.http.post("/v1/responses", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert "half of a surrogate pair" in answer.json()["error"]["message"]


def test_an_item_is_given_once(server: Server) -> None:
    """Else a small body would stand for as much text as it likes."""
    first = server.client.responses.create(**ASK, input="Hello")
    item = reference(first.output[0])
    for how in ({"input": [item, item]}, {"input": [item], "previous_response_id": first.id}):
        with pytest.raises(openai.BadRequestError, match="twice") as error:
            server.client.responses.create(**ASK, **how)
        assert error.value.param == "input"


def test_a_key_sees_its_own(built_base: Path, tmp_path: Path) -> None:
    """Answers of another key are not there, and answers made before there were keys are nobody's."""
    registry = Registry(tmp_path / "home")
    running = Server(load_base(read_record(built_base), device="cpu"), registry)
    ask = {**ASK, "model": "tiny"}
    try:
        unkeyed = running.client.responses.create(**ask, input="Hello")
        ours, theirs = (
            openai.OpenAI(base_url=f"{running.url}/v1", api_key=Keys(registry.home).create()[1], max_retries=0)
            for _ in range(2)
        )
        first = ours.responses.create(**ask, input="Hello")
        assert ours.responses.retrieve(first.id).id == first.id
        for client, other in ((theirs, first), (ours, unkeyed), (theirs, unkeyed)):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(other.id)
            with pytest.raises(openai.NotFoundError):
                client.responses.delete(other.id)
            with pytest.raises(openai.BadRequestError):
                client.responses.create(**ask, input=[FIRST, reference(other.output[0])])
        assert ours.responses.create(**ask, input="More", previous_response_id=first.id).status == "incomplete"
    finally:
        running.stop()


def test_a_server_that_stores_nothing(built_base: Path, served_registry: Registry) -> None:
    """It answers, and says what to do instead of referring."""
    http = HttpOptions(stored_responses=0)
    running = Server(load_base(read_record(built_base), device="cpu"), served_registry, http=http)
    try:
        first = running.client.responses.create(**ASK, input="Hello", store=True)
        assert first.store is False
        for how in ({"input": [reference(first.output[0])]}, {"input": "More", "previous_response_id": first.id}):
            with pytest.raises(openai.BadRequestError, match=r"stores no answers.*store = false"):
                running.client.responses.create(**ASK, **how)
        with pytest.raises(openai.NotFoundError, match="stores no answers"):
            running.client.responses.retrieve(first.id)
    finally:
        running.stop()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("kfw"), st.sampled_from("ab"), st.integers(0, 9)), max_size=60))
def test_no_more_is_kept_than_is_said(steps: list[tuple[str, str, int]]) -> None:
    """Whatever is kept, dropped and waited for: young answers, the oldest of who has most going first, and no items
    but theirs."""
    now = [0.0]
    store = StoredResponses(4, clock=lambda: now[0])
    kept: dict[tuple[str, str], float] = {}
    for number, (step, owner, what) in enumerate(steps):
        if step == "k":
            output = [{"id": f"msg_{number}", "type": "message", "content": []}]
            store.keep(owner, [MessageItem(role="user", content="x" * what)], {"id": f"r{number}", "output": output})
            kept[owner, f"r{number}"] = now[0]
        elif step == "f" and kept:
            at = list(kept)[what % len(kept)]
            store.forget(*at)
            del kept[at]
        else:
            now[0] += what * SECONDS / 8
        kept = {at: since for at, since in kept.items() if since + SECONDS > now[0]}
        if len(kept) > 4:
            counts = {each: sum(owner_ == each for owner_, _ in kept) for each in "ab"}
            most = [each for each in counts if counts[each] == max(counts.values())]
            gone = [at for at in kept if at[0] in most and at not in [(o, n) for o in "ab" for n in store._stored[o]]]
            assert len(gone) == 1
            assert gone[0] == next(at for at in kept if at[0] == gone[0][0])
            del kept[gone[0]]
        for at in [(owner, f"r{place}") for owner in "ab" for place in range(number + 1)]:
            if at in kept:
                assert store.find(*at).response["id"] == at[1]
            else:
                with pytest.raises(NotFound):
                    store.find(*at)
        stored = {(owner, name): found for owner, own in store._stored.items() for name, found in own.items()}
        assert sum(store._sizes.values()) == sum(found.size for found in stored.values())
        holders = {(owner, item_id, name) for (owner, name), found in stored.items() for item_id in found.ids}
        assert holders == {(*item, name) for item, names in store._holders.items() for name in names}


def test_large_answers_make_room_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are bounded, too: the oldest of the key that has most go, and one that is too large takes none with it
    but its key's."""
    monkeypatch.setattr("serve.answers.stored.MAX_BYTES", 6000)
    store = StoredResponses(100)

    def keep(owner: str, name: str, size: int) -> None:
        store.keep(owner, [MessageItem(role="user", content="x" * size)], {"id": name, "output": []})

    keep("b", "theirs", 100)
    for number in range(5):
        keep("a", f"r{number}", 300)
    assert [list(store._stored[owner]) for owner in "ab"] == [["r2", "r3", "r4"], ["theirs"]]
    keep("a", "large", 30_000)
    assert [list(store._stored[owner]) for owner in "ab"] == [[], ["theirs"]]
    store.resize(0)
    assert (len(store._holders), sum(store._sizes.values())) == (0, 0)


def test_small_parts_take_the_room_that_is_counted() -> None:
    """They are kept as JSON: a part of no text is not an object of Python each."""
    parts = [{"type": "input_text", "text": ""}] * 16_000
    asked = ResponsesRequest.model_validate({"model": "m", "input": [{"role": "user", "content": parts}]})
    store = StoredResponses(10)
    conversation = asked.conversation(store.shelf(None))
    tracemalloc.start()
    store.keep(None, conversation, {"id": "r", "output": []})
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken < 1.2 * sum(store._sizes.values()) + 10_000
