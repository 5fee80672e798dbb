"""Prompts to token ids: the base's chat template for conversations, its tokenizer for plain text."""

import inspect
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.chat_settings import ChatSettings
from adapterhub_local.base.chat_template import ChatWriter
from adapterhub_local.base.model import BaseModel
from adapterhub_local.base.renderer import TemplateBound, TemplateFailed
from adapterhub_local.base.tool_format import ToolFormat, format_of
from serve.errors import BadParameter, ContextTooLong
from serve.requests.generation import PLAIN_SAMPLING
from serve.requests.messages import Message, Tool
from serve.text.detokenize import Detokenizer
from serve.text.encode import Encoder, characters
from serve.text.thoughts import AFTER, ThoughtFormat, thoughts_of

PLAIN = ChatSettings()
WRITERS = 64  # ways of writing that are remembered
SWITCHES = ("enable_thinking", "thinking")  # variables of templates that have the model think or not
# what `apply_chat_template` takes itself, and what it gives to every template
RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages", "self"}


class PromptReader:
    """Reads prompts for one base, by many threads at a time, and none that cannot fit into `max_length` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int, max_length: int = 1 << 20) -> None:
        self.tokenizer = tokenizer
        self.vocabulary_size = vocabulary_size
        self.max_length = max_length
        self.encoder = Encoder(tokenizer)
        self._writers: OrderedDict[str, ChatWriter] = OrderedDict()  # by settings
        self._lock = threading.Lock()
        self._spellings: dict[int, str] = {}

    def _writer(self, settings: ChatSettings) -> ChatWriter:
        """What writes conversations in this way, made once."""
        key = json.dumps(settings.to_json(), sort_keys=True, default=str)
        with self._lock:
            writer = self._writers.get(key) or ChatWriter(self.tokenizer, settings)
            self._writers[key] = writer
            self._writers.move_to_end(key)
            if len(self._writers) > WRITERS:
                self._writers.popitem(last=False)
            return writer

    def tool_format(
        self, messages: Sequence[Message], tools: Sequence[Tool], settings: ChatSettings = PLAIN
    ) -> ToolFormat | None:
        """How the base writes calls, if the conversation has to do with tools."""
        if not tools and not any(message.uses_tools for message in messages):
            return None
        writer = self._writer(settings)
        return format_of(writer.template(_schemas(tools) or ()) if writer.has_template else "")

    def thoughts(self, tools: Sequence[Tool] = (), settings: ChatSettings = PLAIN) -> ThoughtFormat | None:
        """How the base marks what it thinks, if it does."""
        writer = self._writer(settings)
        return thoughts_of(writer.template(_schemas(tools) or ()), self.tokenizer) if writer.has_template else None

    def switches(self, effort: str, tools: Sequence[Tool] = (), settings: ChatSettings = PLAIN) -> dict[str, Any]:
        """The template's variables for so much thinking. Raises BadParameter if the base does not think."""
        writer = self._writer(settings)
        template = writer.template(_schemas(tools) or ()) if writer.has_template else ""
        has_effort = bool(re.search(r"\breasoning_effort\b", template))
        if effort != "none" and not has_effort and thoughts_of(template, self.tokenizer) is None:
            message = f"'{effort}' is not supported: the chat template of this base has no thoughts. Leave it out"
            raise BadParameter(message, "reasoning_effort", "unsupported_parameter")
        found: dict[str, Any] = {name: effort != "none" for name in SWITCHES if re.search(rf"\b{name}\b", template)}
        return found | ({"reasoning_effort": effort} if has_effort else {})

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        variables: Mapping[str, Any] = MappingProxyType({}),
        *,
        continues: bool = False,
        begins_answer: bool = True,
        parse_special: bool = False,
        settings: ChatSettings = PLAIN,
    ) -> tuple[int, ...]:
        """Tokens of a conversation, up to where the assistant begins to speak, or continues the last message.

        `settings` are those of the adapter that answers, `variables` the template's own. What any of these spells of
        control tokens is text, unless `parse_special`.
        Raises BadParameter, ContextTooLong.
        """
        writer = self._writer(replace(settings, control_tokens="tokens") if parse_special else settings)
        if not writer.has_template:
            raise BadParameter("this base has no chat template: use /v1/completions", "messages")
        self._check_variables(variables, writer.template(_schemas(tools) or ()))
        turns = [message.for_template() for message in messages]
        self._bound(characters(_schemas(tools)), "tools")
        self._bound(characters(turns), "messages")
        try:
            schemas = _schemas(tools) or ()
            if writer.settings.control_tokens == "text":
                with self._lock:  # made once for each template
                    control = writer.control(schemas)
                variables = control.shield(dict(variables))
            # as training writes it: what a message spells of control tokens is text
            text = writer.write(turns, schemas, begins_answer=begins_answer, continues=continues, variables=variables)
            self._bound(len(text), "messages")
            tokens = writer.shielded_ids(_whole(text, "messages"))
        except TemplateBound as error:
            raise BadParameter(f"the base's chat template cannot write these messages: {error}", "messages") from None
        except (TemplateFailed, RecursionError) as error:  # templates refuse conversations they were not made for
            raise BadParameter(f"the base's chat template refuses these messages: {error}", "messages") from None
        if tokens is None:
            tokens = self._encoded(text, "messages", add_special_tokens=False)
        return self._checked(tokens, "messages")

    def _check_variables(self, variables: Mapping[str, Any], template: str) -> None:
        """Raise BadParameter about what is not a variable of the chat template: it would change nothing or too much."""
        for name in variables:
            if name in RESERVED or not re.search(rf"\b{re.escape(name)}\b", template):
                message = f"'{name[:80]}' is not a variable of this base's chat template that a request may set"
                raise BadParameter(message, "chat_template_kwargs")

    def closed(self, prompt: Sequence[int], form: ThoughtFormat) -> tuple[int, ...]:
        """A prompt that opens a thought, with the thought closed."""
        return (*prompt, *self.encoder.encode(f"\n{form.end}{AFTER}", add_special_tokens=False))

    def plain(self, prompt: str | Sequence[int], *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Tokens of a text, or token ids as they are. Raises BadParameter, ContextTooLong."""
        if not isinstance(prompt, str):
            if len(prompt) > self.max_length:
                self._raise_too_long(f"{len(prompt):,} tokens", "prompt")
            return self._checked(prompt, "prompt")
        return self._checked(self._encoded(prompt, "prompt", add_special_tokens=add_special_tokens), "prompt")

    def _encoded(self, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
        self._bound(len(text), param)
        return self.encoder.encode(_whole(text, param), add_special_tokens=add_special_tokens)

    def _bound(self, num_characters: int, param: str) -> None:
        """Raise ContextTooLong about a text that cannot fit, before it is read: that takes long."""
        if num_characters > self.max_length * self.encoder.longest:
            self._raise_too_long(f"{num_characters:,} characters", param)

    def _raise_too_long(self, size: str, param: str) -> None:
        error = ContextTooLong(f"the context is {self.max_length} tokens, and {size} do not fit: shorten the prompt")
        error.param = param
        raise error

    def text(self, tokens: Sequence[int]) -> str:
        """The text of token ids. Raises BadParameter about those that the base does not have."""
        self._check_known(tokens, "tokens")
        text = self.tokenizer.decode(list(tokens))
        assert isinstance(text, str)
        return text

    def spelling(self, token: int) -> str:
        """The text of one token by itself. Remembered: answers with many log-probabilities ask again and again."""
        if token not in self._spellings:
            text = self.tokenizer.decode([token])
            assert isinstance(text, str)
            self._spellings[token] = text
        return self._spellings[token]

    def offsets(self, text: str, tokens: Sequence[int]) -> list[int]:
        """The character of `text` at which each of its tokens begins.

        A part of a character begins where the character does; what the tokenizer has added has no width.
        """
        pieces = [self.spelling(token) for token in tokens]
        if "".join(pieces) != text:
            added = set(self.tokenizer.all_special_ids)
            reader, place, widths = Detokenizer(self.tokenizer, skip_special_tokens=False), 0, []
            for token, piece in zip(tokens, pieces, strict=True):
                is_added = token in added and not text.startswith(piece, place)
                widths.append(0 if is_added else len(reader.push(token)))
                place += widths[-1]
        else:
            widths = [len(piece) for piece in pieces]
        return [min(place, len(text)) for place in accumulate(widths[:-1], initial=0)]

    def spelled(self, tokens: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it."""
        return list(self.tokenizer.convert_ids_to_tokens(list(tokens)))

    def _checked(self, tokens: Any, param: str) -> tuple[int, ...]:
        if not tokens:
            raise BadParameter("the prompt has no tokens: send some text", param)
        self._check_known(tokens, param)
        return tuple(tokens)

    def _check_known(self, tokens: Sequence[int], param: str) -> None:
        if max(tokens, default=0) >= self.vocabulary_size:
            raise BadParameter(f"token {max(tokens)} is not one of the base's {self.vocabulary_size}", param)


def _whole(text: str, param: str) -> str:
    """`text`, if it is of whole characters: JSON can spell halves that no tokenizer reads. Raises BadParameter."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadParameter(
            f"character {error.start + 1} is half of a surrogate pair, which is not text", param
        ) from None
    return text


def _schemas(tools: Sequence[Tool]) -> list[Any] | None:
    """Tools as chat templates expect them."""
    return [tool.model_dump(exclude_none=True) for tool in tools] or None


def end_tokens(model: BaseModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: those of the generation config and the tokenizer's, if the model has them."""
    found = model.generation_config.eos_token_id if model.generation_config else None
    ids = found if isinstance(found, list) else [found]
    ends = (int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None)
    size = model.get_input_embeddings().weight.shape[0]
    return frozenset(token for token in ends if 0 <= token < size)


def sampling_defaults(model: BaseModel) -> dict[str, Any]:
    """How the base's makers would have its answers sampled, by their generation config, as in vLLM."""
    config = model.generation_config
    if config is None or not config.do_sample:
        return {}
    found = {name: getattr(config, name, None) for name in PLAIN_SAMPLING}
    return {name: value for name, value in found.items() if value is not None}
