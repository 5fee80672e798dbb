"""What a request log says of each answer: equal answers to equal prompts are one, with all feedback on them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from adapterhub_local.counts import counted
from adapterhub_local.data.answer_log import ANSWER, read_log
from adapterhub_local.durable import canonical_json, digest_bytes
from adapterhub_local.refs import Reference

ODD = "not in order, or with numbers that JSON does not have"
CUT = ("length",)  # why an answer is not whole
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Which weights answered: an adapter with its content's digest, or neither of both for the base."""

    adapter: str | None
    digest: str | None
    base: str | None
    fingerprint: str | None


@dataclass
class Judged:
    """One answer to one prompt, however often it was given.

    `ratings` are from 0 to 1, one of each answer that was rated; `corrections` what should have been said instead.
    """

    where: str
    prompt: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    answer: Message
    is_cut: bool
    sources: set[Source] = field(default_factory=set)
    ratings: list[float] = field(default_factory=list)
    corrections: list[Message] = field(default_factory=list)

    @property
    def rating(self) -> float | None:
        """The mean of its ratings; None if it has none."""
        return sum(self.ratings) / len(self.ratings) if self.ratings else None

    @property
    def prompt_digest(self) -> str:
        """Equal for equal prompts with equal tools."""
        return digest_bytes(canonical_json([self.prompt, self.tools]))


@dataclass(frozen=True)
class Asked:
    """Which answers of a log are wanted: of these adapters (none: of all), and not from before `since` (UTC)."""

    adapters: tuple[Reference, ...] = ()
    since: datetime | None = None

    def refusal(self, record: Mapping[str, Any]) -> str | None:
        """Why an answer is not wanted; None if it is."""
        if self.since is not None and not _is_since(record["time"], self.since):
            return "older (--since)"
        if self.adapters and not any(_is_of(each, record) for each in self.adapters):
            return "of other adapters (--adapter)"
        if record.get("begins_answer") is False and not record.get("continues"):
            return "not an answer: the request had add_generation_prompt = false"
        return None


@dataclass
class Log:
    """What was read: `num_answers` answers and feedback on them, what is left out of it and why, and lines that are
    no records."""

    judged: list[Judged] = field(default_factory=list)
    num_answers: int = 0
    num_feedback: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """What it holds, for people."""
        judged = counted(self.num_feedback, "rating or correction", "ratings or corrections")
        return f"{counted(self.num_answers, 'answer')} and {judged}"


def read_judged(folder: Path, asked: Asked) -> Log:
    """The answers of the log in `folder` that are wanted, with the feedback on them. Raises BadData as `read_log`."""
    log, feedback = Log(), _feedback(folder)
    known: dict[str, Judged] = {}
    seen = set()
    for entry in read_log(folder):
        if entry.record is None:
            log.unreadable.append(f"{entry.where}: {entry.problem}")
        elif entry.record["kind"] == ANSWER:
            record, choices = entry.record, entry.record["choices"]
            log.num_answers += len(choices)
            if reason := asked.refusal(record):
                log.left_out[reason] += len(choices)
            for number, choice in enumerate(choices):
                found = feedback.get((record["id"], number))
                seen.add((record["id"], number))
                if reason is not None:
                    continue
                try:
                    _take(log, known, entry.where, record, choice, found)
                except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                    log.left_out[ODD] += 1
    log.num_feedback = len(feedback)
    if gone := len(feedback.keys() - seen):
        log.left_out["feedback on an answer that the log no longer holds"] = gone
    log.judged = list(known.values())
    return log


def _take(
    log: Log,
    known: dict[str, Judged],
    where: str,
    record: Mapping[str, Any],
    choice: Mapping[str, Any],
    feedback: Mapping[str, Any] | None,
) -> None:
    prompt, answer = tuple(record["messages"]), dict(choice["message"])
    if record.get("continues"):  # the answer is the rest of the last message
        prompt, begun = prompt[:-1], prompt[-1]
        answer = {**begun, **answer, "content": begun["content"] + answer["content"]}
    own = Judged(where, prompt, tuple(record["tools"]), answer, choice.get("finish_reason") in CUT)
    key = digest_bytes(canonical_json([prompt, own.tools, _without_ids(answer), own.is_cut]))
    if key in known:
        log.left_out["the same answer to the same prompt once more"] += 1
    own = known.setdefault(key, own)
    base = record["base"]
    source = (record.get("adapter"), record.get("digest"), base.get("name"), base.get("fingerprint"))
    own.sources.add(Source(*(value if isinstance(value, str) else None for value in source)))
    if feedback is None:
        return
    if feedback.get("rating") is not None:
        own.ratings.append(float(feedback["rating"]))
    correction = feedback.get("correction")
    if correction is not None and correction not in own.corrections:
        own.corrections.append(correction)


def _feedback(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The last feedback on each choice of an answer."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for record in _records(folder):
        if record["kind"] != ANSWER:
            key = (record["id"], record["choice"])
            if key not in found or record["time"] >= found[key]["time"]:
                found[key] = record
    return found


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    return (entry.record for entry in read_log(folder) if entry.record is not None)


def _without_ids(message: Message) -> Message:
    """A message without the ids of its calls, which are others in equal answers."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [{k: v for k, v in call.items() if k != "id"} if isinstance(call, Mapping)
                                      else call for call in calls]}  # fmt: skip


def _is_since(time: str, since: datetime) -> bool:
    try:
        return datetime.fromisoformat(time) >= since
    except (ValueError, TypeError):
        return False


def _is_of(reference: Reference, record: Mapping[str, Any]) -> bool:
    """Whether a reference names what answered: a version, any version of a name, or the base by its name."""
    adapter, digest = record.get("adapter"), record.get("digest")
    if not isinstance(adapter, str):
        return bool(str(reference) == record["base"].get("name"))
    name, _, selector = adapter.partition("@")
    if name != reference.name or "*" in selector:  # a mix is none of its adapters
        return False
    if reference.digest is not None:
        return isinstance(digest, str) and digest.startswith(reference.digest)
    return reference.version in (None, int(selector) if selector.isdecimal() else None)
