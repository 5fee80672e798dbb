"""A chat: what one example says, before it is tokens; and the place it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adapterhub_local.durable import canonical_json, digest_bytes
from adapterhub_local.errors import BadData

ROLES = ("system", "user", "assistant")
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """Messages, each `{"role": ..., "content": ...}` with an answer last; or one plain `text` without roles.

    A message of the assistant with `"weight": 0` is not learned. `where` names file and line.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    is_pair: bool = False  # given as prompt and completion, not as a chat

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What the last answer answers."""
        return self.messages[:-1]

    @cached_property
    def prompt_digest(self) -> str:
        """`sha256:<hex>` of what is asked: equal for examples that differ in their last answer only."""
        return digest_bytes(canonical_json(self.text if self.text is not None else self.prompt))


def check_chat(messages: Any, where: str) -> Chat:
    """The chat of these messages. Raises BadData for another structure, and where there is no answer to learn."""
    if not isinstance(messages, list | tuple) or not messages:
        raise BadData(f'{where}: write {{"messages": [{{"role": "user", "content": ...}}, ...]}}')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise BadData(f"{where}: every message needs a role and a content, both text")
        if message["role"] not in ROLES:
            raise BadData(f"{where}: role '{message['role'][:40]}' is not one of {', '.join(ROLES)}")
        if message.get("weight", 1) not in (0, 1):
            raise BadData(f"{where}: the weight of a message is 0 (not learned) or 1, not {message['weight']!r:.40}")
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise BadData(f"{where}: the last message must be the assistant's answer, and not empty")
    if not any(is_learned(message) for message in messages):
        raise BadData(f"{where}: every answer has weight 0, so there is nothing to learn")
    return Chat(where, tuple(messages))


def is_learned(message: Message) -> bool:
    """Whether it is an answer that is to be learned."""
    return message["role"] == "assistant" and bool(message.get("weight", 1))
