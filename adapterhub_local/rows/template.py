"""Chats as text: in the base's own chat template or plain, with the characters that are learned.

What the assistant wrote is found by prefix difference of the model's own chat template: what it adds for a
turn after the generation prompt. This needs no marks in the template (`{% generation %}`).
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_local.data.chat import Chat, is_learned
from adapterhub_local.errors import BadData, InputError

Span = tuple[int, int]


def choose_template(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, wanted: str) -> str:
    """`chat` or `plain`; what `auto` means for this base and these chats. Raises InputError if it cannot be."""
    if all(chat.text is not None for chat in chats):
        return "plain"
    if wanted == "chat" or (wanted == "auto" and tokenizer.chat_template is not None):
        if tokenizer.chat_template is None:
            raise InputError("data.template = 'chat': the base has no chat template: use an instruction-tuned base")
        return "chat"
    talk = next((chat for chat in chats if not (chat.is_pair or chat.text is not None)), None)
    if wanted == "auto" and talk is not None:
        raise InputError(
            f"{talk.where} is a chat, and the base has no chat template: use an instruction-tuned base, or set "
            "data.template = 'plain' if every example is one prompt with one answer"
        )
    longer = next((chat for chat in chats if len(chat.messages) not in (0, 2)), None)
    if longer is not None:
        raise InputError(
            f"{longer.where}: data.template = 'plain' has no way to write several turns or a system message: every "
            "example must be one prompt with one answer; or use an instruction-tuned base and data.template = 'chat'"
        )
    return "plain"


def render(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, template: str, loss_on: str
) -> tuple[str, list[Span] | None]:
    """The text of a chat, and the [start, end) spans of characters that are learned; None for all of them."""
    if template == "plain":
        if tokenizer.eos_token is None:
            raise InputError("the base has no end-of-text token, with which plain text ends: use another base")
        if chat.text is not None:
            return chat.text + tokenizer.eos_token, None
        prompt, answer = (message["content"] for message in chat.messages)
        text = prompt + answer + tokenizer.eos_token
        return text, None if loss_on == "all" else [(len(prompt), len(text))]
    if chat.text is not None:
        raise BadData(f"{chat.where}: plain text among chats: train on one or the other")
    messages = [{"role": message["role"], "content": message["content"]} for message in chat.messages]
    whole = _apply(tokenizer, messages, chat.where, prompt=False)
    if loss_on == "all":
        return whole, None
    turns = [turn for turn, message in enumerate(chat.messages) if is_learned(message)]
    spans = []
    for turn in turns[-1:] if loss_on == "last_answer" else turns:
        before = _apply(tokenizer, messages[:turn], chat.where, prompt=True)
        if not whole.startswith(before):
            raise BadData(
                f"{chat.where}: the base's chat template rewrites earlier turns, so answers cannot be found in it"
            )
        is_last = turn == len(messages) - 1
        after = whole if is_last else _apply(tokenizer, messages[: turn + 1], chat.where, prompt=False)
        end = len(after) if whole.startswith(after) else _rewritten_end(whole, len(before), tokenizer, chat.where)
        spans.append((len(before), end))
    return whole, spans


def _rewritten_end(whole: str, start: int, tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    """The end of an answer that the template writes otherwise once more turns follow, as Qwen3's does with thoughts."""
    end = whole.find(tokenizer.eos_token, start) if tokenizer.eos_token else -1
    if end < 0:
        raise BadData(f"{where}: the base's chat template rewrites earlier turns, so answers cannot be found in it")
    return end + len(tokenizer.eos_token)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], where: str, *, prompt: bool) -> str:
    apply: Any = tokenizer.apply_chat_template
    try:
        return str(apply(messages, add_generation_prompt=prompt, tokenize=False))
    except Exception as error:  # a template is a program, and may raise whatever it likes
        if not messages:
            raise BadData(
                f"{where}: the chat begins with an answer, which the base's chat template cannot tell"
            ) from None
        raise BadData(f"{where}: the base's chat template refuses this chat: {error}") from None
