"""Conversations as the base's chat template writes them: the one way for training, evaluation and the server.

A `ChatWriter` holds what decides the text beside the messages: the template, its variables, where a system message
goes, the day that a template prints, and the tokens at which the server stops.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.chat_settings import DEFAULTS, ChatSettings, is_source
from adapterhub_local.base.control import ControlTokens
from adapterhub_local.base.named_templates import named_template
from adapterhub_local.base.prompted_tools import HEAD, describe_tools
from adapterhub_local.base.renderer import TemplateFailed, chat_text
from adapterhub_local.base.tool_format import format_of
from adapterhub_local.errors import InputError
from adapterhub_local.recipe.template_file import names_file, read_template

Messages = Sequence[Mapping[str, Any]]


class ChatWriter:
    """Writes conversations for one tokenizer and one `ChatSettings`. Not for several threads at a time."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: ChatSettings = DEFAULTS,
        stops: frozenset[int] | None = None,
    ) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        named = tokenizer.eos_token_id
        self.stops = stops if stops is not None else frozenset(() if named is None else (named,))
        self._controls: dict[str, ControlTokens] = {}

    @cached_property
    def has_template(self) -> bool:
        return bool(self.settings.chat_template or self.tokenizer.chat_template)

    def template(self, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The source of the template that writes a conversation with these tools. Raises InputError."""
        wanted = self.settings.chat_template
        if wanted is None or is_source(wanted):
            return wanted or str(self.tokenizer.get_chat_template(tools=[dict(tool) for tool in tools] or None))
        return named_template(wanted, self.tokenizer.chat_template)

    @property
    def prints_date(self) -> bool:
        """Whether the template prints today's date."""
        return "strftime_now" in self.template()

    def control(self, tools: Sequence[Mapping[str, Any]] = ()) -> ControlTokens:
        """The control tokens under the template."""
        template = self.template(tools)
        if template not in self._controls:
            self._controls[template] = ControlTokens(self.tokenizer, template)
        return self._controls[template]

    def write(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        begins_answer: bool,
        continues: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, control tokens in messages shielded; `ControlTokens.encode` reads it.

        `begins_answer` adds what makes the assistant speak. Where the template has no tools whose calls the server
        reads, the system's turn describes them, and calls and results are text. Raises TemplateFailed where the
        template refuses it, or takes more than a template may take.
        """
        how: dict[str, Any] = {"begins_answer": begins_answer, "continues": continues, "variables": variables or {}}
        if not self.describes_tools(messages, tools):
            return self._write(messages, tools, self.settings.system_role, **how)
        turns = describe_tools(for_template(messages), tools)
        text = ""
        try:
            text = self._write(turns, (), self.settings.system_role, **how)
        except TemplateFailed:
            if self.settings.system_role == "user":
                raise
        if not text or (tools and HEAD not in text):  # a template without a system's turn, or that leaves it out
            text = self._write(turns, (), "user", **how)
        return text

    def describes_tools(self, messages: Messages, tools: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a conversation has to do with tools that its template does not know, and which text describes."""
        has_tools = bool(tools) or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in messages)
        return has_tools and format_of(self.template(tools)).is_prompted

    def _write(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]], system_role: str, *,
        begins_answer: bool, continues: bool, variables: Mapping[str, Any],
    ) -> str:  # fmt: skip
        turns = for_template(messages, system_role)
        template, schemas = self.template(tools), list(tools)
        if self.settings.control_tokens == "text":
            control = self.control(tools)
            turns, schemas = control.shield_messages(turns), control.shield(schemas)
        given = {**self.settings.template_args, **variables}
        if self.settings.day is not None and "strftime_now" in template:
            template, given["qhub_dates"] = _on_day(template, datetime.date.fromisoformat(self.settings.day))
        return chat_text(
            self.tokenizer, turns, template=template, tools=schemas, begins_answer=begins_answer, continues=continues,
            variables=given,
        )  # fmt: skip

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that `write` wrote, with any tools: what is shielded is recognised by its spelling."""
        for control in self._controls.values():
            if any(control.is_shielded(text) for text in texts):
                return control.encode(texts)
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def shielded_ids(self, text: str) -> list[int] | None:
        """The token ids of one text that `write` wrote with control tokens shielded; None for any other text, which
        the tokenizer reads by itself."""
        for control in list(self._controls.values()):
            if control.is_shielded(text):
                return control.encode([text])[0]
        return None

    def restore(self, text: str) -> str:
        """A text that `write` wrote, as people read it."""
        for control in self._controls.values():
            text = control.restore(text)
        return text


def given_template(wanted: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The source of the template that a base is given: by name, or a .jinja file's. Raises InputError."""
    is_file = names_file(wanted)
    text = read_template(wanted, Path()) if is_file else named_template(wanted, tokenizer.chat_template)
    asked = "what the user says"
    try:
        written = chat_text(tokenizer, [{"role": "user", "content": asked}], template=text, begins_answer=True)
    except TemplateFailed as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the chat template {wanted} cannot write a message of the user: {reason}") from None
    if asked not in written:
        raise InputError(f"the chat template {wanted} does not write what the user says: is it a chat template?")
    return text


def for_template(messages: Messages, system_role: str = "system") -> list[dict[str, Any]]:
    """Messages as chat templates expect them: `developer` is `system`, arguments of calls are tables.

    With `system_role = "user"` each system message stands before the text of the next message of the user.
    """
    turns: list[dict[str, Any]] = []
    waiting: list[str] = []
    for message in messages:
        role = "system" if message["role"] == "developer" else message["role"]
        turn = {key: value for key, value in message.items() if key != "weight" and value is not None} | {"role": role}
        if turn.get("tool_calls"):
            turn["tool_calls"] = [_call(call) for call in turn["tool_calls"]]
        turn.setdefault("content", "")
        if system_role == "user" and role == "system":
            waiting.append(turn["content"])
            continue
        if waiting and role == "user":
            turn["content"] = "\n\n".join([*waiting, turn["content"]])
            waiting = []
        elif waiting:  # nobody of the user's follows: it is the user's own
            turns.append({"role": "user", "content": "\n\n".join(waiting)})
            waiting = []
        turns.append(turn)
    return turns + ([{"role": "user", "content": "\n\n".join(waiting)}] if waiting else [])


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call of a tool with its arguments as an object where their text is one."""
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            value = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            value = None
        function["arguments"] = value if isinstance(value, dict) else function["arguments"]
    return {**{key: value for key, value in call.items() if key != "index"}, "function": function}


def stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer of the base in `folder`: those of its generation config, and the tokenizer's.

    Without the model, as `serve` finds them with it.
    """
    found: Any = None
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_bytes()).get("eos_token_id")
        except (OSError, ValueError):
            continue
        break
    ids = found if isinstance(found, list) else [found]
    return frozenset(int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None)


def _on_day(template: str, day: datetime.date) -> tuple[str, dict[str, str]]:
    """The template with a `strftime_now` of its own that prints `day`, and what it prints for each format."""
    formats = {match[2] for match in re.finditer(r"strftime_now\s*\(\s*(['\"])(.{0,100}?)\1", template)}
    macro = "{%- macro strftime_now(format) -%}{{ qhub_dates[format] }}{%- endmacro -%}"
    return macro + template, {text: day.strftime(text) for text in formats}
