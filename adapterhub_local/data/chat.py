"""A chat: what one example says, before it is tokens; and the place it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adapterhub_local.data.blocks import unfold
from adapterhub_local.data.json_text import check_json_text, parsed
from adapterhub_local.durable import canonical_json, digest_bytes
from adapterhub_local.errors import BadData

ROLES = ("system", "user", "assistant", "tool")
CALLED = {  # what roles are called elsewhere -> here
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "ipython": "tool",
    "function": "tool",
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
TOOLS = ("tools", "functions")
KEPT = ("name", "tool_call_id", "weight")  # beside role, content, calls and thoughts
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """Messages as `/v1/chat/completions` has them, an answer last; or one plain `text` without roles.

    Each message is `{"role": ..., "content": text}`; the assistant's may have `reasoning_content` and `tool_calls`,
    those of a tool `tool_call_id` and `name`. `tools` are the schemas that were offered. A message of the assistant
    with `"weight": 0` is not learned. `where` names file and line. Where answers are judged, `rejected` is another last
    message than the one that was chosen, and `is_good` says what the last one is.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    is_pair: bool = False  # given as prompt and completion, not as a chat
    tools: tuple[Mapping[str, Any], ...] = ()
    rejected: Message | None = None
    is_good: bool = True

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What the last answer answers."""
        return self.messages[:-1]

    @property
    def texts(self) -> list[str]:
        """All texts of the chat, joined."""
        return [self.text] if self.text is not None else [message["content"] for message in self.messages]

    @cached_property
    def prompt_digest(self) -> str:
        """`sha256:<hex>` of what is asked: equal for examples that differ in their last answer only."""
        asked: Any = self.text if self.text is not None else self.prompt
        return digest_bytes(canonical_json([asked, self.tools] if self.tools else asked))


def check_chat(
    messages: Any, where: str, roles: Mapping[str, str] | None = None, tools: Any = None, *, is_pair: bool = False
) -> Chat:
    """The chat of these messages. Raises BadData for another structure, and where there is no answer to learn.

    `roles` says which of ours a role of the data is, beside those that are known.
    """
    messages = parsed(messages)
    check_json_text(messages, "messages", where)
    if not isinstance(messages, list | tuple) or not messages:
        raise BadData(f'{where}: write {{"messages": [{{"role": "user", "content": ...}}, ...]}}')
    checked = [_check_message(message, where, roles or {}) for message in unfold(messages, where)]
    last = checked[-1]
    if last["role"] != "assistant":
        raise BadData(f"{where}: the last message is the {last['role']}'s, and must be the assistant's answer")
    if not (last["content"].strip() or last.get("tool_calls")):
        raise BadData(f"{where}: the answer is empty")
    is_blank = [message["role"] == "user" and not message["content"].strip() for message in checked]
    if any(is_blank) or (len(checked) == 1 and is_learned(last)):
        raise BadData(
            f"{where}: the prompt is empty; a text without a prompt is a row with the one column text"
            if len([message for message in checked if message["role"] != "system"]) <= 2
            else f"{where}: a message of the user is empty"
        )
    if not any(is_learned(message) for message in checked):
        raise BadData(f"{where}: every answer has weight 0, so there is nothing to learn")
    return Chat(where, tuple(checked), is_pair=is_pair, tools=check_tools(tools, where))


def tools_of(row: Mapping[str, Any]) -> Any:
    """What a row says of tools: the column `tools`, or `functions` as OpenAI called it before; None for neither."""
    return next((row[name] for name in TOOLS if row.get(name)), None)


def earlier_turns(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """The messages of LLaMA-Factory's column `history`, pairs of what was asked and answered. Raises BadData."""
    earlier = parsed(row.get("history")) or []
    pairs: list[Any] = earlier if isinstance(earlier, list) else [None]
    if not all(isinstance(turn, list) and len(turn) == 2 and all(isinstance(content, str) for content in turn)
               for turn in pairs):  # fmt: skip
        raise BadData(f"{where}: history must be a list of [question, answer], all text")
    return [{"role": role, "content": content} for turn in pairs
            for role, content in zip(("user", "assistant"), turn, strict=True)]  # fmt: skip


def check_tools(tools: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """The schemas of tools as OpenAI writes them; a bare function is put into one. Raises BadData."""
    tools = parsed(tools)
    check_json_text(tools, "tools", where)
    if not tools:
        return ()
    if not isinstance(tools, list):
        raise BadData(f"{where}: tools must be a list of schemas")
    checked = []
    for tool in tools:
        tool = _without_nulls(parsed(tool))
        tool = {"type": "function", "function": tool} if isinstance(tool, dict) and "name" in tool else tool
        function = parsed(tool.get("function")) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadData(f'{where}: a tool is {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}')
        if "parameters" not in function and "input_schema" in function:  # Anthropic's name for them
            function = {("parameters" if key == "input_schema" else key): part for key, part in function.items()}
        parameters = parsed(function.get("parameters"))
        checked.append({**tool, "function": {**function, **({} if parameters is None else {"parameters": parameters})}})
    return tuple(checked)


def _check_message(message: Any, where: str, roles: Mapping[str, str]) -> Message:
    """The message with its content as one text. Raises BadData for what would be lost in that."""
    message = _without_nulls(parsed(message))
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadData(f"{where}: every message needs a role and a content, both text")
    named = message["role"].strip()
    role = roles.get(named) or CALLED.get(named.lower(), named)
    if role not in ROLES:
        raise BadData(
            f"{where}: role '{named[:40]}' is not one of {', '.join(ROLES)}: data.roles says which it is, "
            f"such as {{ '{named[:40]}' = 'user' }}"
        )
    if unread := [key for key in ("train", "training") if message.get(key) is False]:
        raise BadData(f'{where}: a message has "{unread[0]}": false: write "weight": 0 for an answer not to be learned')
    if message.get("weight", 1) not in (0, 1):
        raise BadData(f"{where}: the weight of a message is 0 (not learned) or 1, not {message['weight']!r:.40}")
    if media := [key for key in MEDIA if message.get(key)]:
        raise BadData(f"{where}: a message has {media[0]}: only text is supported, leave these examples out")
    calls = _calls(message, where)
    checked = {"role": role, "content": _content(message, where, is_optional=bool(calls))}
    checked |= {key: message[key] for key in KEPT if key in message}
    if calls:
        checked["tool_calls"] = calls
    if (calls or message.get("tool_calls")) and role != "assistant":
        raise BadData(f"{where}: a message of the {role} has tool_calls: only the assistant calls tools")
    thoughts = [message[key] for key in THOUGHTS if message.get(key)]
    if thoughts:
        if role != "assistant" or not isinstance(thoughts[0], str):
            raise BadData(f"{where}: thoughts (reasoning_content) are text, and the assistant's")
        checked["reasoning_content"] = thoughts[0]
    return checked


def _content(message: Mapping[str, Any], where: str, *, is_optional: bool) -> str:
    content = message.get("content")
    if isinstance(content, list):  # OpenAI's parts, or Bedrock's, whose texts have no type
        content = [{"type": "text", **part} if isinstance(part, dict) and set(part) == {"text"} else part
                   for part in content]  # fmt: skip
        if not all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content):
            raise BadData(
                f'{where}: a part of a content is {{"type": "text", "text": ...}}, or the content is one text'
            )
        parts: list[dict[str, Any]] = content
        if others := [part["type"] for part in parts if part["type"] != "text"]:
            raise BadData(f"{where}: a content has a part '{others[0][:40]}': only text is supported")
        texts = [part.get("text") for part in parts]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)  # type: ignore[arg-type]
    if content is None and is_optional:
        return ""
    if not isinstance(content, str):
        raise BadData(f"{where}: every message needs a role and a content, both text")
    return content


def _calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The calls of a message as OpenAI writes them now; also its older `function_call`."""
    calls = parsed(message.get("tool_calls")) or []
    if function := parsed(message.get("function_call")):
        calls = [*calls, {"function": function}] if isinstance(calls, list) else calls
    if not isinstance(calls, list):
        raise BadData(f"{where}: tool_calls must be a list of calls")
    checked = []
    for call in calls:
        call = parsed(call)
        if isinstance(call, dict) and "function" not in call and "name" in call:  # a bare function
            call = {"function": call}
        function = parsed(call.get("function")) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadData(
                f'{where}: a call is {{"id": ..., "type": "function", "function": {{"name": ..., "arguments": ...}}}}'
            )
        arguments = function.get("arguments", function.get("parameters", {}))
        arguments = _without_nulls(arguments) if not isinstance(arguments, str) else arguments
        extra = {key: call[key] for key in ("id",) if isinstance(call.get(key), str)}
        checked.append(
            {**extra, "type": "function", "function": {"name": function["name"], "arguments": parsed(arguments)}}
        )
    return checked


def _without_nulls(value: Any) -> Any:
    """Without keys that have no value: files that went through Arrow have every key everywhere."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def is_learned(message: Message) -> bool:
    """Whether it is an answer that is to be learned."""
    return message["role"] == "assistant" and bool(message.get("weight", 1))


def split_thought(message: Message) -> tuple[str, str]:
    """What an answer thinks and what it says: thoughts of their own, or those before a closing mark in the content."""
    content: str = message["content"]
    if message.get("reasoning_content"):
        return message["reasoning_content"], content
    for opening, closing in MARKS:
        before, mark, after = content.rpartition(closing)
        if mark and (opening in before or not before.strip().startswith("<")):
            return before.rpartition(opening)[2], after
    return "", content


MARKS = (  # what opens a thought and what closes it, by family
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought\n", "<channel|>"),
)
