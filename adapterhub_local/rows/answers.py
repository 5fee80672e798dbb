"""Answers as token ids: behind the prompt's own ids, up to a stop, several in one example where that is exact."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from adapterhub_local.base.chat_template import ChatWriter
from adapterhub_local.data.chat import Chat
from adapterhub_local.data.trouble import Troubles
from adapterhub_local.errors import BadData, InputError
from adapterhub_local.rows.example import Example
from adapterhub_local.rows.template import Answer, after_answer, left_out, write_answers, write_whole

CHUNK = 1000  # chats tokenised in one call: all cores of the tokenizer at work, little memory


@dataclass
class Findings:
    """What was seen on the way: stops that were added, and what templates left out, with the places."""

    stops: Counter[str] = field(default_factory=Counter)
    lost: dict[str, list[str]] = field(default_factory=dict)

    def lose(self, parts: Sequence[str], where: str) -> None:
        for part in parts:
            places = self.lost.setdefault(part, [])
            if places[-1:] != [where]:
                places.append(where)


def encode_chats(
    chats: Sequence[Chat], writer: ChatWriter, loss_on: str, troubles: Troubles, findings: Findings
) -> Iterator[tuple[Chat, list[Example]]]:
    """Every chat with its examples, in order; those that cannot be written are added to `troubles` and left out."""
    for start in range(0, len(chats), CHUNK):
        part, written = chats[start : start + CHUNK], []
        for chat in part:
            try:
                written.append((chat, [] if loss_on == "all" else write_answers(chat, writer, loss_on)))
            except BadData as error:
                troubles.add(chat.where, error)
        if loss_on == "all":
            yield from _all_tokens([chat for chat, _ in written], writer, troubles, findings)
            continue
        texts = [text for _, answers in written for answer in answers
                 for text in (answer.prompt, answer.prompt + answer.text)]  # fmt: skip
        encoded = iter(writer.encode(texts))
        for chat, answers in written:
            pairs = [(next(encoded), next(encoded)) for _ in answers]
            try:
                examples = [
                    _example(chat, writer, answer, *pair, findings) for answer, pair in zip(answers, pairs, strict=True)
                ]
            except BadData as error:
                troubles.add(chat.where, error)
                continue
            yield chat, joined(examples)


def _all_tokens(
    chats: Sequence[Chat], writer: ChatWriter, troubles: Troubles, findings: Findings
) -> Iterator[tuple[Chat, list[Example]]]:
    for chat in chats:
        try:
            text = write_whole(chat, writer)
        except BadData as error:
            troubles.add(chat.where, error)
            continue
        findings.lose(left_out(chat, writer, text, None), chat.where)
        (ids,) = writer.encode([text])
        if len(ids) < 2:
            troubles.add(chat.where, BadData(f"{chat.where}: the example has no token to learn"))
            continue
        yield chat, [Example(tuple(ids), ((1, len(ids)),))]


def _example(
    chat: Chat, writer: ChatWriter, answer: Answer, prompt: list[int], whole: list[int], findings: Findings
) -> Example:
    """One answer behind its prompt, as the server would send it, learned up to the first token that ends an answer."""
    missing = left_out(chat, writer, answer.prompt + answer.text, answer.turn)
    start = len(prompt)
    ids = whole if whole[:start] == prompt else prompt + _encode_behind(answer.text, writer)
    if not prompt or len(ids) <= start:
        why = f": the base's chat template leaves out {' and '.join(missing)}" if missing else ""
        raise BadData(f"{chat.where}: an answer has no token to learn{why}")
    findings.lose(missing, chat.where)
    end = next((at + 1 for at in range(start, len(ids)) if ids[at] in writer.stops), None)
    if end is None:
        stop = _stop_behind(chat, writer, answer)
        findings.stops[str(writer.tokenizer.convert_ids_to_tokens(stop))] += 1
        ids = [*ids, stop]
        end = len(ids)
    return Example(tuple(ids), ((start, end),))


def _encode_behind(text: str, writer: ChatWriter) -> list[int]:
    """The ids of a text whose first token would grow together with the end of its prompt."""
    eos, number = writer.tokenizer.eos_token, writer.tokenizer.eos_token_id
    if isinstance(eos, str):  # behind a control token nothing grows together, and no blank is put before it
        ids = writer.encode([eos + text])[0]
        if ids[:1] == [number]:
            return ids[1:]
    return writer.encode([text])[0]


def _stop_behind(chat: Chat, writer: ChatWriter, answer: Answer) -> int:
    """What ends an answer that its template leaves open: the mark of the next turn if the server stops there, or eos.

    Raises InputError where the server would stop at nothing.
    """
    behind = writer.encode([after_answer(chat, writer, answer)])[0][:1]
    if behind and behind[0] in writer.stops:
        return behind[0]
    eos = writer.tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            f"{chat.where}: the base's chat template writes nothing at the end of an answer, and the base has no "
            "end-of-text token, so no answer could end: name another template with data.chat_template, or use another "
            "base"
        )
    return int(eos)


def joined(examples: Sequence[Example]) -> list[Example]:
    """Examples of one chat, each in the next one where that begins with it, up to the stop of its last answer."""
    whole: list[Example] = []
    for example in examples:
        if whole:
            earlier = whole[-1]
            end = earlier.spans[-1][1]
            if example.ids[:end] == earlier.ids[:end] and end <= example.spans[0][0]:
                whole[-1] = Example(example.ids, earlier.spans + example.spans)
                continue
        whole.append(example)
    return whole
