"""Chats as text: each answer behind the prompt that the server would send for it, or plain.

What is learned is what the model has to write after that prompt. Nothing is searched for in the text of a whole chat:
templates write a turn otherwise once others follow it, and open or close thoughts that they do not write again.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.chat_template import ChatWriter
from adapterhub_local.base.renderer import TemplateBound, TemplateFailed
from adapterhub_local.data.chat import MARKS, Chat, Message, is_learned, split_thought
from adapterhub_local.errors import BadData, InputError

Span = tuple[int, int]
PROBE = "qhubanswerprobe"  # stands for an answer where only what a template writes around one is wanted


@dataclass(frozen=True)
class Answer:
    """What the server would send for one turn of the assistant, and what is learned after it, control tokens shielded.

    `text` may go on behind the stop with what the template writes there.
    """

    prompt: str
    text: str
    turn: int


def choose_template(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase | ChatWriter, wanted: str) -> str:
    """`chat` or `plain`; what `auto` means for this base and these chats. Raises InputError if it cannot be."""
    writer = tokenizer if isinstance(tokenizer, ChatWriter) else ChatWriter(tokenizer)
    if all(chat.text is not None for chat in chats):
        return "plain"
    if wanted == "chat" or (wanted == "auto" and writer.has_template):
        if not writer.has_template:
            raise InputError(
                "data.template = 'chat': the base has no chat template: use an instruction-tuned base, or name a "
                "template with data.chat_template"
            )
        return "chat"
    talk = next((chat for chat in chats if not (chat.is_pair or chat.text is not None)), None)
    if wanted == "auto" and talk is not None:
        raise InputError(
            f"{talk.where} is a chat, and the base has no chat template: use an instruction-tuned base, name "
            "a template with data.chat_template, or set data.template = 'plain' for prompts with one answer each"
        )
    longer = next((chat for chat in chats if len(chat.messages) not in (0, 2) or chat.tools), None)
    if longer is not None:
        raise InputError(
            f"{longer.where}: data.template = 'plain' cannot write several turns, tools or a system message: "
            "give one prompt and one answer in every example, or use an instruction-tuned base and "
            "data.template = 'chat'"
        )
    return "plain"


def write_plain(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """A text, or a prompt and its answer, as they are, with the end of text; and where the answer begins."""
    if tokenizer.eos_token is None:
        raise InputError("the base has no end-of-text token, which plain text needs at its end: use another base")
    if chat.text is not None:
        return chat.text + tokenizer.eos_token, 0
    prompt, answer = (message["content"] for message in chat.messages)
    return prompt + answer + tokenizer.eos_token, len(prompt)


def write_whole(chat: Chat, writer: ChatWriter) -> str:
    """The whole chat as its template writes it. Raises BadData where the template refuses it."""
    _check_talk(chat)
    return _write(chat, writer, chat.messages, begins_answer=False)


def write_answers(chat: Chat, writer: ChatWriter, loss_on: str) -> list[Answer]:
    """Every answer of the chat that is learned (`answer` or `last_answer`). Raises BadData where there is no way."""
    _check_talk(chat)
    turns = [turn for turn, message in enumerate(chat.messages) if is_learned(message)]
    return [_answer(chat, writer, turn) for turn in (turns[-1:] if loss_on == "last_answer" else turns)]


def after_answer(chat: Chat, writer: ChatWriter, answer: Answer) -> str:
    """What the template writes right behind an answer once the user speaks again; empty where that is not known."""
    more = [*chat.messages[: answer.turn + 1], {"role": "user", "content": PROBE}]
    try:
        text = _write(chat, writer, more, begins_answer=False)
    except BadData:
        return ""
    before = answer.prompt + answer.text
    return text[len(before) :].partition(PROBE)[0] if text.startswith(before) else ""


def _check_talk(chat: Chat) -> None:
    if chat.text is not None:
        raise BadData(f"{chat.where}: this is plain text, and other examples are chats: train on one or the other")


def _answer(chat: Chat, writer: ChatWriter, turn: int) -> Answer:
    prompt = _write(chat, writer, chat.messages[:turn], begins_answer=True)
    written = _write(chat, writer, chat.messages[: turn + 1], begins_answer=False)
    if written.startswith(prompt):
        return Answer(prompt, written[len(prompt) :], turn)
    # the prompt has more than the template writes before an answer, or other earlier turns: find where answers begin
    plain: Message = {"role": "assistant", "content": PROBE}
    probe = _write(chat, writer, [*chat.messages[:turn], plain], begins_answer=False)
    header = probe[: probe.rfind(PROBE)] if PROBE in probe else ""
    shared = len(os.path.commonprefix([prompt, header]))
    asked = _write(chat, writer, chat.messages[:turn], begins_answer=False) if turn else ""
    earlier = len(os.path.commonprefix([prompt, asked]))  # some templates end a chat in a mark of its own
    if header and shared >= earlier and written.startswith(header[:shared]):
        return Answer(prompt, _behind(prompt, prompt[shared:], written[shared:], chat.messages[turn], writer), turn)
    if header and written.startswith(header) and _asks_alike(prompt, header, chat.messages[turn - 1]):
        return Answer(prompt, written[len(header) :], turn)
    if split_thought(chat.messages[turn])[0].strip():
        raise BadData(
            f"{chat.where}: the base's chat template asks for message {turn + 1} without thoughts, and it has some: "
            "set the template's variables so that it thinks (data.template_args), or leave the thoughts out of the data"
        )
    raise BadData(
        f"{chat.where}: the base's chat template writes message {turn + 1} differently from the prompt that asks for "
        "it, so what to learn cannot be found: name another template with data.chat_template"
    )


def _asks_alike(prompt: str, header: str, last: Message) -> bool:
    """Whether prompt and header end in the same way, the whole last message included: only what is before differs."""
    shared = len(os.path.commonprefix([prompt[::-1], header[::-1]]))
    content = last["content"].strip()
    return bool(content) and content in header[len(header) - shared :]


def _behind(prompt: str, opened: str, written: str, message: Message, writer: ChatWriter) -> str:
    """What is learned behind a prompt that ends in `opened`, which the template does not write before this answer.

    A thought that the prompt opens is gone on with and closed; what it closes itself, or a blank, needs nothing.
    """
    for opening, closing in MARKS:
        if opening.strip() in opened and closing not in opened.rpartition(opening.strip())[2]:
            if written.startswith(opening.strip()):  # as the prompt does, but for a blank
                return written.removeprefix(opening.strip()).lstrip("\n")
            if closing in written:
                return written
            thought, _ = split_thought(message)
            if writer.settings.control_tokens == "text":
                thought = writer.control().shield(thought, is_answer=True)
            thought = thought.lstrip("\n") if prompt.endswith("\n") else thought
            blank = written if written[:1].isspace() else f"\n\n{written}"
            return thought + ("" if thought.endswith("\n") else "\n") + closing + blank
    return written


def left_out(chat: Chat, writer: ChatWriter, text: str, turn: int | None) -> list[str]:
    """What of the chat up to `turn` (the answer that is learned; None: of all) is not in what its template wrote.

    Thoughts of earlier turns are not looked for: templates leave them out on purpose, for the server as well.
    """
    text = writer.restore(text)
    missing: list[str] = []
    wanted: Counter[str] = Counter()
    last = len(chat.messages) - 1 if turn is None else turn
    for number, message in enumerate(chat.messages[: last + 1]):
        thought, answer = split_thought(message) if message["role"] == "assistant" else ("", message["content"])
        pieces = [(f"{'an' if message['role'] == 'assistant' else 'a'} {message['role']} message", answer)]
        if number == last:
            pieces.append(("the thoughts of an answer", thought))
        for what, piece in pieces:
            if piece.strip():
                wanted[piece.strip()] += 1
                if not _occurs(piece.strip(), wanted[piece.strip()], text):
                    missing.append(what)
        for call in message.get("tool_calls") or ():
            function = call["function"]
            if not all(_occurs(part, 1, text) for part in (function["name"], *_leaves(function["arguments"]))):
                missing.append("calls of tools")
    if not all(_occurs(tool["function"]["name"], 1, text) for tool in chat.tools):
        missing.append("the tools that are offered")
    return list(dict.fromkeys(missing))


def _occurs(piece: str, times: int, text: str) -> bool:
    """Whether a text holds a piece so often: as it is, as JSON spells it, or with other blanks."""
    if times == 1 and piece in text:
        return True
    spelled = (piece, json.dumps(piece)[1:-1], json.dumps(piece, ensure_ascii=False)[1:-1])
    if any(text.count(way) >= times for way in spelled):
        return True
    collapsed = re.sub(r"\s+", "", text)
    return any(collapsed.count(re.sub(r"\s+", "", way)) >= times for way in spelled)


def _leaves(value: Any) -> list[str]:
    """The texts in the arguments of a call."""
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value] if isinstance(value, str) and value.strip() else []


def _write(chat: Chat, writer: ChatWriter, messages: Sequence[Message], *, begins_answer: bool) -> str:
    if not messages:
        raise BadData(
            f"{chat.where}: the chat begins with an answer: put the message of the user that it answers before "
            'it, or give it "weight": 0'
        )
    try:
        text = writer.write(messages, chat.tools, begins_answer=begins_answer)
    except TemplateBound as error:  # so would the next chats, at a second each
        raise InputError(f"{chat.where}: the base's chat template cannot write this chat: {error}") from None
    except (TemplateFailed, RecursionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = (
            ": data.system_role = 'user' puts it before the user's text"
            if "system" in reason.lower() or _fails_for_system(chat, writer)
            else ""
        )
        raise BadData(f"{chat.where}: the base's chat template refuses this chat: {reason}{hint}") from None
    return text


def _fails_for_system(chat: Chat, writer: ChatWriter) -> bool:
    """Whether the chat has a system message, without which its template would write it."""
    others = [message for message in chat.messages if message["role"] != "system"]
    if len(others) == len(chat.messages):
        return False
    try:
        writer.write(others, chat.tools, begins_answer=False)
    except (TemplateFailed, RecursionError):
        return False
    return True
