"""Chats from JSONL files, as token ids with the assistant's answers marked; knows nothing of batches."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_local.errors import BadData, InputError

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]


@dataclass(frozen=True)
class Example:
    """One tokenised chat: `ids`, and the [start, end) spans of ids that the assistant wrote.

    A span ends with the end-of-turn token, so that the model learns to stop; the last is the answer.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def num_labels(self) -> int:
        return sum(end - start for start, end in self.spans)


def read_chats(path: Path, limit: int | None = None) -> list[list[Message]]:
    """The chats of a JSONL file, each line `{"messages": [{"role": ..., "content": ...}, ...]}`.

    Raises BadData with file and line: not JSON, another structure, no answer to learn, no lines.
    """
    chats = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    chats.append(_chat(line, f"{path}:{number}"))
                if len(chats) == limit:
                    break
    except FileNotFoundError:
        raise BadData(f"there is no data file {path}") from None
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not chats:
        raise BadData(f"{path} has no examples")
    return chats


def _chat(line: str, where: str) -> list[Message]:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise BadData(f"{where}: not JSON: {reason}") from None
    messages = fields.get("messages") if isinstance(fields, dict) else None
    if not isinstance(messages, list) or not messages:
        raise BadData(f'{where}: write {{"messages": [{{"role": "user", "content": ...}}, ...]}}')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise BadData(f"{where}: every message needs a role and a content, both text")
        if message["role"] not in ROLES:
            raise BadData(f"{where}: role '{message['role'][:40]}' is not one of {', '.join(ROLES)}")
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise BadData(f"{where}: the last message must be the assistant's answer, and not empty")
    return messages


def tokenise(
    chats: list[list[Message]], tokenizer: PreTrainedTokenizerBase, max_length: int, path: Path
) -> list[Example]:
    """Chats as the model's own chat template spells them. Raises BadData for an example longer than `max_length`.

    The assistant's tokens are found by prefix difference: what the template adds for a turn after the
    generation prompt. This needs no marks in the template.
    """
    if tokenizer.chat_template is None:
        raise InputError("the base has no chat template, which chat data needs: use an instruction-tuned base")
    examples = [_tokenise(messages, tokenizer, f"{path} example {number}") for number, messages in enumerate(chats, 1)]
    for number, example in enumerate(examples, 1):
        if len(example.ids) > max_length:
            raise BadData(
                f"{path} example {number} has {len(example.ids)} tokens, data.max_length is {max_length}: "
                "raise it or shorten the example"
            )
    return examples


def _tokenise(messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str) -> Example:
    def ids(part: list[Message], prompt: bool) -> list[int]:
        return template_ids(tokenizer, part, add_generation_prompt=prompt)

    whole = ids(messages, False)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = ids(messages[:turn], True)
        after = whole if turn == len(messages) - 1 else ids(messages[: turn + 1], False)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise BadData(f"{where}: the base's chat template rewrites earlier turns, so answers cannot be found in it")
        spans.append((len(before), _end_of_turn(whole, len(before), len(after), tokenizer.eos_token_id)))
    return Example(tuple(whole), tuple(spans))


def template_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, add_generation_prompt: bool
) -> list[int]:
    """The token ids of a chat in the model's own template."""
    render: Callable[..., Any] = tokenizer.apply_chat_template
    return list(render(messages, add_generation_prompt=add_generation_prompt, return_dict=False))


def _end_of_turn(ids: list[int], start: int, end: int, eos: int | None) -> int:
    """The end of a turn after its last end-of-turn token; what a template writes after it is not learned."""
    stops = [position for position in range(start, end) if ids[position] == eos]
    return stops[-1] + 1 if stops else end
