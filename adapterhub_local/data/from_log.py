"""Training rows from a request log, in the forms that recipes read: each is read back before it is written."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_local.data.answer_log import FILE, line
from adapterhub_local.data.calls import check_called
from adapterhub_local.data.chat import Chat
from adapterhub_local.data.columns import recognise, renamed
from adapterhub_local.data.formats import read_chat
from adapterhub_local.data.logged import ODD, Asked, Judged, Log, Message, Source, read_judged
from adapterhub_local.data.requests import as_messages
from adapterhub_local.durable import check_absent, digest_file, on_full_disk, replacing
from adapterhub_local.errors import BadData, InputError, InUse
from adapterhub_local.recipe.objectives import ANSWERS, JUDGED, PAIRS

FORMS = {"messages": ANSWERS, "preference": PAIRS, "judged": JUDGED}  # data.format -> what a row is
OBJECTIVE = {"messages": "sft", "preference": "dpo", "judged": "kto"}
MIDDLE = 0.5  # above it an answer is good, below it bad
UNRATED, AS_GIVEN = "not rated", "the correction is the answer itself"
ALONE = "no better or worse answer to the same prompt is left for it"
CUT_OFF = "cut off before their end (finish_reason length)"


@dataclass(frozen=True)
class Wanted:
    """Which rows are wanted: their form, and from which rating on an answer is good (None: from above the middle)."""

    form: str = "messages"
    min_rating: float | None = None
    rated_only: bool = False

    def is_good(self, rating: float) -> bool | None:
        """Whether an answer with this rating is good; None if it is neither good nor bad."""
        if self.min_rating is not None:
            return rating >= self.min_rating
        return None if rating == MIDDLE else rating > MIDDLE


@dataclass(frozen=True)
class Spoken:
    """A conversation as the server had it, which a row has to stand for."""

    prompt: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    answer: Message
    rejected: Message | None = None


@dataclass
class Rows:
    """The lines to write, and where they come from. `taken`: rows by what they were made of."""

    log: Log
    lines: list[bytes] = field(default_factory=list)
    taken: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    sources: Counter[Source] = field(default_factory=Counter)  # rows with an answer of these weights
    _seen: set[bytes] = field(default_factory=set)

    def add(self, form: str, kind: str, spoken: Spoken, parts: Iterable[Judged], label: bool | None = None) -> None:
        """Take a row if it is new, and if the reader of training data reads in it what the server had."""
        try:
            row = _row(spoken, label)
            _check_read_back(row, form, spoken)
            own = line(row)
        except BadData as error:
            self.left_out[str(error).removeprefix("row: ")] += 1
            return
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):  # a log that somebody has edited
            self.left_out[ODD] += 1
            return
        if own in self._seen:
            self.left_out["the same row once more"] += 1
            return
        self._seen.add(own)
        self.lines.append(own)
        self.taken[kind] += 1
        self.sources.update({source for part in parts for source in part.sources})


def rows_of_log(folder: Path, asked: Asked, wanted: Wanted) -> Rows:
    """The training rows of the log in `folder`. Raises BadData if there is no log."""
    log = read_judged(folder, asked)
    rows = Rows(log, left_out=Counter(log.left_out))
    if wanted.form == "preference":
        _preferences(rows, wanted)
    else:
        for judged in log.judged:
            (_answers if wanted.form == "messages" else _labels)(rows, judged, wanted)
    return rows


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raise InputError or InUse unless rows may be written to `out`, which replaces what is there with `overwrite`."""
    if out.suffix.lower() != ".jsonl" or FILE.fullmatch(out.name):
        why = "that is the name of a log's own file" if FILE.fullmatch(out.name) else "rows are JSON lines"
        raise InputError(f"{out}: {why}: name a file that ends in .jsonl, such as rows.jsonl")
    if not out.exists():
        check_absent(out)
    elif not overwrite:
        raise InUse(f"{out} exists already: name another file, or replace it with --overwrite")
    elif not out.is_file() or not os.access(out.absolute().parent, os.W_OK):
        raise InputError(f"{out} is not a file that can be replaced: name another one")


def write_rows(rows: Rows, folder: Path, out: Path) -> dict[str, Any]:
    """Write rows to a file for this user alone, all or nothing; what is to be reported of them, as plain values.

    Raises BadData if there are none, QhubError if the disk is full.
    """
    left_out = {reason: count for reason, count in rows.left_out.most_common() if count}
    if not rows.lines:
        why = "; ".join(f"{reason}: {count:,}" for reason, count in left_out.items())
        raise BadData(f"{folder} has nothing to train on ({rows.log.summary}){f', left out: {why}' if why else ''}")
    with on_full_disk(out, "no rows were written"), replacing(out, 0o600) as staged, open(staged, "wb") as file:
        file.writelines(rows.lines)
    return {
        "digest": digest_file(out),
        "rows": len(rows.lines),
        "answers": rows.log.num_answers,
        "feedback": rows.log.num_feedback,
        "taken": dict(rows.taken.most_common()),
        "left_out": left_out,
        "unreadable": rows.log.unreadable,
        "answers_of": [{**asdict(source), "rows": count} for source, count in rows.sources.most_common()],
    }


def _answers(rows: Rows, judged: Judged, wanted: Wanted) -> None:
    """A row for an answer to be learned, or for each correction of it."""
    corrections = _corrections(rows, judged)
    for message in corrections:
        _add_answer(rows, judged, message, "corrections")
    if corrections:
        return
    if judged.rating is None and (wanted.rated_only or wanted.min_rating is not None):
        rows.left_out[UNRATED] += 1
    elif judged.rating is not None and not wanted.is_good(judged.rating):
        rows.left_out[f"rated below {wanted.min_rating:g}" if wanted.min_rating is not None else "not rated good"] += 1
    elif judged.is_cut:
        rows.left_out[CUT_OFF] += 1
    else:
        _add_answer(rows, judged, judged.answer, "answers")


def _labels(rows: Rows, judged: Judged, wanted: Wanted) -> None:
    """An answer judged good or bad; one that was corrected and not rated is bad, its correction good."""
    corrections = _corrections(rows, judged)
    for message in corrections:
        _add_answer(rows, judged, message, "corrections", label=True)
    label = wanted.is_good(judged.rating) if judged.rating is not None else False if corrections else None
    if judged.rating is None and label is None:
        rows.left_out[UNRATED] += 1
    elif label is None:
        rows.left_out["rated neither good nor bad"] += 1
    elif judged.is_cut:
        rows.left_out[CUT_OFF] += 1
    else:
        _add_answer(rows, judged, judged.answer, "good answers" if label else "bad answers", label=label)


def _preferences(rows: Rows, wanted: Wanted) -> None:
    """A correction over the answer, and of answers to one prompt the better over the worse: the best over the worst,
    the second best over the second worst and so on."""
    by_prompt: dict[str, list[Judged]] = {}
    corrected: set[int] = set()
    for judged in rows.log.judged:
        corrections = _corrections(rows, judged)
        if judged.is_cut and (corrections or judged.rating is not None):
            rows.left_out[CUT_OFF] += 1
            continue
        for message in corrections:
            corrected.add(id(judged))
            _add_pair(rows, judged, message, judged, "corrections over answers")
        if judged.rating is not None:
            by_prompt.setdefault(judged.prompt_digest, []).append(judged)
        elif not corrections:
            rows.left_out[UNRATED] += 1
    for group in by_prompt.values():
        ranked = sorted(group, key=lambda judged: judged.rating or 0.0)
        pairs = [
            (better, worse)
            for worse, better in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False)
            if better.rating != worse.rating and (better.rating or 0.0) >= (wanted.min_rating or 0.0)
        ]
        for better, worse in pairs:
            _add_pair(rows, better, better.answer, worse, "better over worse answers")
        paired = corrected | {id(judged) for pair in pairs for judged in pair}
        rows.left_out[ALONE] += sum(id(judged) not in paired for judged in ranked)


def _corrections(rows: Rows, judged: Judged) -> list[Message]:
    others = [message for message in judged.corrections if message != judged.answer]
    rows.left_out[AS_GIVEN] += len(judged.corrections) - len(others)
    return others


def _add_answer(rows: Rows, judged: Judged, answer: Message, kind: str, label: bool | None = None) -> None:
    form = "messages" if label is None else "judged"
    rows.add(form, kind, Spoken(judged.prompt, judged.tools, answer), [judged], label)


def _add_pair(rows: Rows, better: Judged, chosen: Message, worse: Judged, kind: str) -> None:
    spoken = Spoken(better.prompt, better.tools, chosen, worse.answer)
    rows.add("preference", kind, spoken, [better] if better is worse else [better, worse])


def _row(spoken: Spoken, label: bool | None) -> dict[str, Any]:
    """A row with the columns of its form."""
    # each answer of a conversation has a record of its own, judged by itself: in a row the last alone is learned
    prompt = [
        _written(message) | ({"weight": 0} if message["role"] == "assistant" else {}) for message in spoken.prompt
    ]
    answer, tools = _written(spoken.answer), _offered(spoken.tools)
    if spoken.rejected is not None:
        return {"prompt": prompt, "chosen": [answer], "rejected": [_written(spoken.rejected)], **tools}
    return {"messages": [*prompt, answer], **tools, **({} if label is None else {"label": label})}


def _written(message: Message) -> dict[str, Any]:
    """A message as OpenAI writes it: arguments are JSON in text, in which nothing is taken for a missing value."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    written = [{**call, "function": {**call["function"], "arguments": _text(call["function"]["arguments"])}}
               for call in calls]  # fmt: skip
    return {**message, "tool_calls": written}


def _offered(tools: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    """The column of the tools; a schema that has nulls is JSON in text, in which they are kept."""
    written = []
    for tool in tools:
        function = dict(tool["function"])
        if "parameters" in function and any(value is None for value in _leaves(function["parameters"])):
            function["parameters"] = _text(function["parameters"])
        written.append({**tool, "function": function})
    return {"tools": written} if written else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _check_read_back(row: dict[str, Any], form: str, spoken: Spoken) -> None:
    """Raise BadData unless training reads in a row exactly what the server had."""
    asked = renamed(as_messages(row, "row"), None)
    if recognise(asked, "row", FORMS[form]) != form:
        raise BadData("row: training would take it for another form")
    chat: Chat = read_chat(asked, "row", form)
    check_called(chat)
    messages = tuple({key: value for key, value in message.items() if key != "weight"} for message in chat.messages)
    read = (messages[:-1], chat.tools, messages[-1], chat.rejected)
    if read != (spoken.prompt, spoken.tools, spoken.answer, spoken.rejected):
        raise BadData("row: training would read something else in it than the server had")
