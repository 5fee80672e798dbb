"""A chat: what one example says, before it is tokens; and the place it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adapterhub_local.durable import canonical_json, digest_bytes
from adapterhub_local.errors import BadData

ROLES = ("system", "user", "assistant")
TOOLS = ("tool_calls", "function_call", "tool_call_id")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
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

    @property
    def texts(self) -> list[str]:
        """All that is said in it."""
        return [self.text] if self.text is not None else [message["content"] for message in self.messages]

    @cached_property
    def prompt_digest(self) -> str:
        """`sha256:<hex>` of what is asked: equal for examples that differ in their last answer only."""
        return digest_bytes(canonical_json(self.text if self.text is not None else self.prompt))


def check_chat(messages: Any, where: str) -> Chat:
    """The chat of these messages. Raises BadData for another structure, and where there is no answer to learn."""
    if not isinstance(messages, list | tuple) or not messages:
        raise BadData(f'{where}: write {{"messages": [{{"role": "user", "content": ...}}, ...]}}')
    messages = [_check_message(message, where) for message in messages]
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise BadData(f"{where}: the last message must be the assistant's answer, and not empty")
    if not any(is_learned(message) for message in messages):
        raise BadData(f"{where}: every answer has weight 0, so there is nothing to learn")
    return Chat(where, tuple(messages))


def _check_message(message: Any, where: str) -> Message:
    """The message, its content as one text. Raises BadData for what would be lost in that."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadData(f"{where}: every message needs a role and a content, both text")
    if told := [key for key in TOOLS if message.get(key)] or (message["role"] in ("tool", "function")) * ["tool"]:
        raise BadData(f"{where}: a message has {told[0]}: tools are not supported, leave these examples out")
    if thought := [key for key in THOUGHTS if message.get(key)]:
        raise BadData(
            f"{where}: a message has {thought[0]}, which is not learned: put it into content, or leave it out"
        )
    if message["role"] not in ROLES:
        raise BadData(f"{where}: role '{message['role'][:40]}' is not one of {', '.join(ROLES)}")
    if unread := [key for key in ("train", "training") if message.get(key) is False]:
        raise BadData(f'{where}: a message has "{unread[0]}": false: write "weight": 0 for an answer not to be learned')
    if message.get("weight", 1) not in (0, 1):
        raise BadData(f"{where}: the weight of a message is 0 (not learned) or 1, not {message['weight']!r:.40}")
    content = message.get("content")
    if isinstance(content, list):  # OpenAI's parts
        parts = [part if isinstance(part, dict) else {} for part in content]
        if others := [part.get("type") for part in parts if part.get("type") != "text"]:
            raise BadData(f"{where}: a content has a part '{str(others[0])[:40]}': only text is supported")
        texts = [part.get("text") for part in parts]
        if all(isinstance(text, str) for text in texts):
            return {**message, "content": "".join(texts)}  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise BadData(f"{where}: every message needs a role and a content, both text")
    return message


def is_learned(message: Message) -> bool:
    """Whether it is an answer that is to be learned."""
    return message["role"] == "assistant" and bool(message.get("weight", 1))
