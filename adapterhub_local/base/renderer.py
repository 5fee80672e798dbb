"""Chat templates are rendered in processes apart, bounded in time, memory and length (see `render_chats.py`).

A template comes with a base, an adapter or a recipe, and transformers' sandbox has no bounds: `{{ 'a' * 10**10 }}` or
loops within loops would hold up whoever renders it.
"""

import atexit
import functools
import json
import marshal
import os
import queue
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_local.apart import Apart, Died
from adapterhub_local.base import render_chats
from adapterhub_local.base.render_chats import LONGEST, MEMORY, SECONDS
from adapterhub_local.errors import QhubError

PROCESSES = 4  # templates that run at the same time: one that takes its whole second keeps three ways for others
START = 120.0  # seconds of the clock, on a machine that is busy
WAIT = 30.0
# what the function that renders takes itself, so that no template can have a variable of this name
TAKEN = frozenset(("conversations", "tools", "chat_template", "return_assistant_tokens_mask", "continue_final_message",
                   "add_generation_prompt"))  # fmt: skip


class TemplateFailed(Exception):
    """A template did not write a conversation; the message is the template's own, or says what went wrong in it."""


class TemplateBound(TemplateFailed):
    """A template took more than one may take; the message begins with `it`, the template."""


class _Process:
    """One process, which says once that it is ready."""

    def __init__(self, seconds: float) -> None:
        self.apart = Apart(Path(render_chats.__file__), str(seconds))
        self._is_ready = False

    def wait(self) -> None:
        """Raise QhubError if it does not start."""
        try:
            if not self._is_ready:
                self.apart.receive(START)
            self._is_ready = True
        except Died:
            raise QhubError(
                "the process in which chat templates run does not start: is the machine out of memory?"
            ) from None


class Renderer:
    """Renders for many threads at a time. Processes start when they are needed, and are kept.

    `seconds` of the processor are what one conversation may take.
    """

    def __init__(self, processes: int = PROCESSES, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._owner = os.getpid()
        self._free: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(processes):
            self._free.put(None)

    def warm(self) -> None:
        """Start one process, so that the first conversation does not wait for it."""
        process = self._free.get()
        self._free.put(process or _Process(self._seconds))

    def render(self, conversation: Sequence[Mapping[str, Any]], template: str, **given: Any) -> str:
        """What `transformers.utils.chat_template_utils.render_jinja_template` writes of one conversation.

        `given` are its other arguments, among them the template's variables. Raises TemplateFailed.
        """
        question = _plain([list(conversation), {"chat_template": template, **given}])
        process = self._free.get()
        kept = None
        try:
            if process is not None and not process.apart.is_alive:
                process.apart.close()
                process = None
            process = process or _Process(self._seconds)
            process.wait()
            process.apart.send(question)
            answer = process.apart.receive(WAIT)
            kept = process
        except Died:
            raise TemplateBound(f"it did not finish within {WAIT:.0f} s") from None
        finally:
            if process is not None and kept is None:
                process.apart.close()
            self._free.put(kept)
        return _text(answer, self._seconds)

    def close(self) -> None:
        """End the processes that are idle."""
        idle = []
        while not self._free.empty():
            idle.append(self._free.get_nowait())
        for process in idle:
            if process is not None and os.getpid() == self._owner:
                process.apart.close()
            self._free.put(None)


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    begins_answer: bool = False,
    continues: bool = False,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """What `tokenizer.apply_chat_template(..., tokenize=False)` gives, bounded. `template`: None for its own.

    Raises TemplateFailed.
    """
    if not messages:
        raise TemplateFailed("the conversation has no messages")
    if continues and begins_answer:
        raise TemplateFailed("it cannot continue the last message and begin another one")
    if taken := sorted(TAKEN & variables.keys()):
        raise TemplateFailed(f"'{taken[0]}' cannot be a variable of a chat template")
    schemas = [dict(tool) for tool in tools] or None
    given = {**tokenizer.special_tokens_map, **variables}
    return shared().render(
        [{key: value for key, value in message.items() if value is not None} for message in messages],
        template if template is not None else str(tokenizer.get_chat_template(tools=schemas)),
        tools=schemas, add_generation_prompt=begins_answer,
        continue_final_message=continues, **given,
    )  # fmt: skip


@functools.cache
def shared() -> Renderer:
    """The one of this process."""
    renderer = Renderer()
    atexit.register(renderer.close)
    os.register_at_fork(after_in_child=shared.cache_clear)  # a fork has pipes that its parent talks through
    return renderer


def _plain(value: Any) -> bytes:
    try:
        return marshal.dumps(value)
    except ValueError:  # a date of a recipe or the like: transformers shows its templates the name of the type
        return marshal.dumps(json.loads(json.dumps(value, default=lambda other: f"<{type(other).__name__}>")))


def _text(answer: bytes, seconds: float) -> str:
    """The text in an answer. Raises TemplateFailed."""
    kind, text = answer[0], answer[1:].decode("utf-8", "surrogatepass")
    match kind:
        case render_chats.TEXT:
            return text
        case render_chats.FAILED:
            raise TemplateFailed(text)
        case render_chats.TOO_LARGE:
            raise TemplateBound(f"it needs more than the {MEMORY >> 20} MiB that a template may have")
        case render_chats.TOO_LONG:
            raise TemplateBound(f"it writes more than the {LONGEST >> 20} MiB of text that a template may write")
    if int(text) == signal.SIGPROF:
        raise TemplateBound(f"it takes longer than the {seconds:g} s of computing that a template may take")
    if int(text) in (signal.SIGSEGV, signal.SIGBUS):
        raise TemplateBound("it is nested too deeply: it ended the process in which it ran")
    raise TemplateBound(f"it ended the process in which it ran ({signal.Signals(int(text)).name})")
