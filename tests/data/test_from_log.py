"""Rows from a request log: which answers are taken, what is made of ratings and corrections, and damaged logs."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_local.cli.main import qhub
from adapterhub_local.data.answer_log import line, new_name, read_log
from adapterhub_local.data.from_log import FORMS, Wanted, rows_of_log
from adapterhub_local.data.logged import Asked
from adapterhub_local.errors import BadData, BadReference, InputError, InUse

USER = {"role": "user", "content": "Hi"}


def answer(number: int, text: str = "Hello", prompt: str = "Hi", **changes: Any) -> dict:
    """An answer as the server logs it."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": changes.pop("finish", "stop")}
    return {
        "kind": "answer", "id": f"chatcmpl-{number}", "key": None, "num_choices": 1,
        "time": f"2026-01-0{1 + number // 10}T00:00:00.000Z", "adapter": "sql@3", "digest": "sha256:" + "a" * 64,
        "base": {"name": "tiny", "fingerprint": "sha256:" + "b" * 64},
        "messages": [{"role": "user", "content": prompt}], "tools": [], "continues": False, "parameters": {},
        "choices": [choice], **changes,
    }  # fmt: skip


def feedback(number: int, **given: Any) -> dict:
    """Feedback on it."""
    if isinstance(given.get("correction"), str):
        given["correction"] = {"role": "assistant", "content": given["correction"]}
    return {"kind": "feedback", "id": f"chatcmpl-{number}", "key": None, "choice": 0,
            "time": "2026-02-01T00:00:00.000Z", **given}  # fmt: skip


def write_log(folder: Path, *records: dict) -> Path:
    """A log of one file."""
    folder.mkdir(exist_ok=True)
    (folder / new_name()).write_bytes(b"".join(map(line, records)))
    return folder


def taken(log: Path, form: str = "messages", asked: Asked = Asked(), **wanted: Any) -> list:  # noqa: B008
    """What the rows of a log say, in short: answers, pairs of answers, or answers with their labels."""
    rows = [json.loads(row) for row in rows_of_log(log, asked, Wanted(form, **wanted)).lines]
    if form == "preference":
        return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    texts = [row["messages"][-1]["content"] for row in rows]
    return texts if form == "messages" else [(text, row["label"]) for text, row in zip(texts, rows, strict=True)]


def run(*arguments: str) -> Result:
    """`qhub data from-log`."""
    return CliRunner().invoke(qhub, ["data", "from-log", *map(str, arguments)])


LOG = (
    *(answer(0, "unrated"), answer(1, "good"), answer(2, "bad"), answer(3, "middle"), answer(4, "wrong")),
    *(answer(5, "cut", finish="length"), answer(6, "half"), answer(7, "as it is")),
    *(feedback(1, rating=1), feedback(2, rating=0), feedback(3, rating=0.5), feedback(4, correction="right")),
    *(feedback(5, rating=1), feedback(6, rating=0.6), feedback(7, rating=0.9, correction="as it is")),
)


def test_each_form_takes_what_it_can_use(tmp_path: Path) -> None:
    """Corrections take the answer's place; what is bad or cut off is not learned; pairs are best over worst."""
    log = write_log(tmp_path / "log", *LOG)
    assert taken(log) == ["unrated", "good", "right", "half", "as it is"]
    assert taken(log, rated_only=True) == ["good", "right", "half", "as it is"]
    assert taken(log, min_rating=0.7) == ["good", "right", "as it is"]
    assert taken(log, min_rating=0.0) == ["good", "bad", "middle", "right", "half", "as it is"]
    judged = [("good", True), ("bad", False), ("right", True), ("wrong", False), ("half", True), ("as it is", True)]
    assert taken(log, "judged") == judged
    assert ("half", False) in taken(log, "judged", min_rating=0.7)
    assert ("middle", True) in taken(log, "judged", min_rating=0.5)
    assert taken(log, "preference") == [("right", "wrong"), ("good", "bad"), ("as it is", "middle")]
    assert taken(log, "preference", min_rating=0.95) == [("right", "wrong"), ("good", "bad")]


@pytest.mark.parametrize("form", FORMS)
def test_every_answer_is_a_row_or_is_counted(form: str, tmp_path: Path) -> None:
    """Nothing is left out without a reason."""
    log = write_log(tmp_path / "log", *LOG, answer(8, "unrated"), feedback(99, rating=1))
    rows = rows_of_log(log, Asked(), Wanted(form))
    said = ("unrated", "good", "bad", "middle", "wrong", "cut", "half", "as it is")
    used = [text for text in said if any(f'"{text}"' in row.decode() for row in rows.lines)]
    reasons = dict(rows.left_out)
    reasons.pop("the correction is the answer itself")
    is_replaced = form == "messages"  # the answer that was corrected is in no row
    assert len(used) + is_replaced + sum(reasons.values()) == len(said) + 2
    assert sum(rows.taken.values()) == len(rows.lines)
    assert reasons["feedback on an answer that the log no longer holds"] == 1


def test_equal_answers_are_one_with_all_their_ratings(tmp_path: Path) -> None:
    """The mean of what was said of the same answer to the same prompt counts; ids of calls make no difference."""
    log = write_log(
        tmp_path / "log", *(answer(n, "same") for n in range(3)), answer(3, "same", "Other prompt"), answer(4, "other"),
        feedback(0, rating=1), feedback(1, rating=0), feedback(2, rating=1), feedback(4, rating=0.2),
    )  # fmt: skip
    assert taken(log) == ["same", "same"]
    assert taken(log, "judged") == [("same", True), ("other", False)]
    assert taken(log, "preference") == [("same", "other")]

    def call(identity: str) -> dict:
        function = {"name": "now", "arguments": {}}
        message = {"role": "assistant", "content": "", "tool_calls": [{"id": identity, "type": "function",
                                                                       "function": function}]}  # fmt: skip
        return {"choices": [{"message": message, "finish_reason": "tool_calls"}]}

    log = write_log(tmp_path / "calls", answer(0, **call("a")), answer(1, **call("b")))
    assert len(taken(log)) == 1


def test_the_last_feedback_counts_as_a_whole(tmp_path: Path) -> None:
    """By its time, in whatever file it is; what an earlier one said is gone."""
    late = feedback(0, rating=0) | {"time": "2026-03-01T00:00:00.000Z"}
    log = write_log(tmp_path / "log", answer(0, "a"), late, feedback(0, rating=1, correction="b"))
    assert taken(log, "judged") == [("a", False)]


def test_answers_are_chosen_by_adapter_and_time(tmp_path: Path) -> None:
    """A name is all of its versions, a version that one, a base's name the base alone."""
    of = {"sql@3": 0, "sql@30": 1, "sql@2": 2, "sq@3": 3, None: 4, "sql@3*0.7+tone@1*0.3": 5}
    log = write_log(
        tmp_path / "log",
        *(answer(10 * n, f"{n}", adapter=adapter, digest=f"sha256:{n}{'a' * 63}" if adapter else None)
          for adapter, n in of.items()),
    )  # fmt: skip

    def chosen(*options: str) -> str:
        done = run(log, "-o", tmp_path / "rows.jsonl", "--overwrite", *options)
        assert done.exit_code == 0, done.output
        rows = (tmp_path / "rows.jsonl").read_text().splitlines()
        return "".join(json.loads(row)["messages"][-1]["content"] for row in rows)

    assert chosen("--adapter", "sql") == "012"
    assert chosen("--adapter", "sql@3") == "0"
    assert chosen("--adapter", "sql@v3", "--adapter", "sq") == "03"
    assert chosen("--adapter", f"sql@sha256:2{'a' * 20}") == "2"
    assert chosen("--adapter", "tiny") == "4"
    assert chosen("--since", "2026-01-04") == "345"
    assert chosen("--since", "2026-01-04T00:00:01") == "45"
    assert chosen("--since", "2026-01-04T01:30:00+01:00") == "45"
    assert chosen("--since", "9000d") == "012345"
    for wrong in (["--adapter", "sql@prod"], ["--adapter", "../x"]):
        assert isinstance(run(log, "-o", tmp_path / "new.jsonl", *wrong).exception, BadReference)
    for wrong in (["--since", "yesterday"], ["--since", "-1d"], ["--since", ""], ["--min-rating", "2"]):
        assert run(log, "-o", tmp_path / "new.jsonl", *wrong).exit_code == 2
    done = run(log, "-o", tmp_path / "new.jsonl", "--since", "1h", "--adapter", "sql")
    assert isinstance(done.exception, BadData)
    assert "older (--since): 6" in str(done.exception)
    assert not (tmp_path / "new.jsonl").exists()


def test_the_report_and_the_file(tmp_path: Path) -> None:
    """Both say the same; the file is for its owner alone, replaced only when asked, and never half-written."""
    log, out = write_log(tmp_path / "log", *LOG), tmp_path / "rows.jsonl"
    report = json.loads(run(log, "--out", out, "--json").output)
    assert (report["rows"], report["answers"], report["feedback"]) == (5, 8, 7)
    assert report["taken"] == {"answers": 4, "corrections": 1}
    assert report["left_out"] == {
        "not rated good": 2,
        "cut off before their end (finish_reason length)": 1,
        "the correction is the answer itself": 1,
    }
    source = {"adapter": "sql@3", "digest": "sha256:" + "a" * 64, "base": "tiny", "fingerprint": "sha256:" + "b" * 64}
    assert report["answers_of"] == [source | {"rows": 5}]
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    text = out.read_bytes()
    assert isinstance(run(log, "--out", out).exception, InUse)
    assert out.read_bytes() == text
    done = run(log, "--out", out, "--as", "judged", "--overwrite")
    for part in ("6 rows", "sql@3: 6 rows", "left out (1): not rated", "train.objective = 'kto'"):
        assert part in done.output
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    for wrong in (
        tmp_path / "rows.json",
        tmp_path / "rows",
        folder,
        tmp_path / "none" / "rows.jsonl",
        log / new_name(),
    ):
        assert isinstance(run(log, "--out", wrong, "--overwrite").exception, InputError)
    for nothing in (tmp_path / "none", folder, out):
        assert isinstance(run(nothing, "--out", tmp_path / "new.jsonl").exception, BadData)


def test_what_hides_in_a_log_is_shown(tmp_path: Path) -> None:
    """Names that a terminal would obey are printed as what they are."""
    log = write_log(tmp_path / "log", answer(0, adapter="a\x1b[2J\u202e@1"))
    done = run(log, "--out", tmp_path / "rows.jsonl")
    assert done.exit_code == 0
    assert "\x1b" not in done.output
    assert "\u202e" not in done.output


WHOLE = b"".join(map(line, LOG))


@given(st.integers(0, len(WHOLE)), st.binary(max_size=40))
@settings(max_examples=50)
def test_a_log_cut_anywhere_is_read(tmp_path_factory: pytest.TempPathFactory, at: int, rest: bytes) -> None:
    """Of any beginning of a log every whole line counts, and at most one is reported; with anything behind it, too."""
    for end, most in ((b"", 1), (rest, 2 + rest.count(b"\n"))):
        folder = tmp_path_factory.mktemp("log")
        (folder / new_name()).write_bytes(WHOLE[:at] + end)
        entries = list(read_log(folder))
        wrong = [entry for entry in entries if entry.record is None]
        assert len(wrong) <= most
        assert len(entries) - len(wrong) >= WHOLE[:at].count(b"\n")
        for form in FORMS:
            rows = rows_of_log(folder, Asked(), Wanted(form))
            assert len(rows.log.unreadable) == len(wrong)


INNER = ("role", "content", "type", "tool_calls", "function", "name", "arguments", "rating", "correction", "message")
NAMED = st.sampled_from(sorted({*LOG[0], *INNER}))
WORDS = st.text(max_size=5) | st.sampled_from(["user", "assistant"])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | WORDS,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(NAMED, part, max_size=5),
    max_leaves=15,
)


@given(st.sampled_from(LOG), st.dictionaries(st.sampled_from(sorted({*LOG[0], *LOG[-1]})), JSON, max_size=3))
@settings(max_examples=50)
def test_a_log_that_was_edited_is_read(tmp_path_factory: pytest.TempPathFactory, record: dict, changes: dict) -> None:
    """Whatever stands in a record, or in its messages, it is a row, left out or reported; never a traceback."""
    inside = record | {"messages": [USER | changes], "tools": [changes], "choices": [{"message": USER | changes}]}
    log = write_log(tmp_path_factory.mktemp("log"), *LOG[:3], record | changes, inside, *LOG[8:])
    for form in FORMS:
        rows_of_log(log, Asked(), Wanted(form))
