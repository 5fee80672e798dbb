"""Prompts to token ids: the base's chat template for conversations, its tokenizer for plain text."""

import inspect
import re
import threading
from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.chat_template import ChatWriter
from serve.errors import BadParameter
from serve.requests.generation import PLAIN_SAMPLING
from serve.requests.messages import Message, Tool
from serve.text.detokenize import Detokenizer
from serve.text.tools import ToolFormat, format_of

# what `apply_chat_template` takes itself, and what it gives to every template
RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages", "self"}


class PromptReader:
    """The base's tokenizer, used by one thread at a time: encoding changes its state."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocabulary_size = vocabulary_size
        self._lock = threading.Lock()
        self._writer = ChatWriter(tokenizer)
        self._spellings: dict[int, str] = {}

    def tool_format(self, messages: Sequence[Message], tools: Sequence[Tool]) -> ToolFormat | None:
        """How the base writes calls, if the conversation has to do with tools. Raises BadParameter if it knows none."""
        if not tools and not any(message.uses_tools for message in messages):
            return None
        found = format_of(self.tokenizer.get_chat_template(tools=_schemas(tools)) if self._has_template else "")
        if found is None:
            param = "tools" if tools else "messages"
            raise BadParameter("the chat template of this base has no tools, or calls them in an unknown way", param)
        return found

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        variables: Mapping[str, Any] = MappingProxyType({}),
        *,
        continues: bool = False,
        begins_answer: bool = True,
    ) -> tuple[int, ...]:
        """Tokens of a conversation, up to where the assistant begins to speak, or goes on with the last message.

        `variables` are the template's own. Raises BadParameter.
        """
        if not self._has_template:
            raise BadParameter("this base has no chat template: use /v1/completions", "messages")
        self._check_variables(variables, tools)
        turns = [message.for_template() for message in messages]
        try:
            with self._lock:
                # as training writes it: what a message spells of control tokens is text
                text = self._writer.write(
                    turns, _schemas(tools) or (), begins_answer=begins_answer, continues=continues, variables=variables
                )
                tokens = self._writer.shielded_ids(_whole(text, "messages"))
                if tokens is None:
                    tokens = self.tokenizer.encode(text, add_special_tokens=False)
                return self._checked(tokens, "messages")
        except (
            TemplateError,
            TypeError,
            ValueError,
            AttributeError,
            LookupError,
        ) as error:  # templates refuse conversations they were not made for
            raise BadParameter(f"the base's chat template refuses these messages: {error}", "messages") from None

    def _check_variables(self, variables: Mapping[str, Any], tools: Sequence[Tool]) -> None:
        """Raise BadParameter about what is no variable of the chat template: it would change nothing, or too much."""
        template = self.tokenizer.get_chat_template(tools=_schemas(tools)) if variables else ""
        for name in variables:
            if name in RESERVED or not re.search(rf"\b{re.escape(name)}\b", template):
                message = f"'{name[:80]}' is no variable of this base's chat template that a request may set"
                raise BadParameter(message, "chat_template_kwargs")

    @property
    def _has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def plain(self, prompt: str | Sequence[int], *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Tokens of a text, or token ids as they are. Raises BadParameter."""
        if not isinstance(prompt, str):
            return self._checked(prompt, "prompt")
        with self._lock:
            tokens = self.tokenizer.encode(_whole(prompt, "prompt"), add_special_tokens=add_special_tokens)
            return self._checked(tokens, "prompt")

    def text(self, tokens: Sequence[int]) -> str:
        """The text of token ids. Raises BadParameter about those that the base does not have."""
        self._check_known(tokens, "tokens")
        with self._lock:
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
        with self._lock:
            return list(self.tokenizer.convert_ids_to_tokens(list(tokens)))

    def _checked(self, tokens: Any, param: str) -> tuple[int, ...]:
        if not tokens:
            raise BadParameter("the prompt has no tokens: say something", param)
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
            f"character {error.start + 1} is half of a surrogate pair, which is no text", param
        ) from None
    return text


def _schemas(tools: Sequence[Tool]) -> list[Any] | None:
    """Tools as chat templates expect them."""
    return [tool.model_dump(exclude_none=True) for tool in tools] or None


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: those of the generation config, and the tokenizer's."""
    found = model.generation_config.eos_token_id if model.generation_config else None
    ids = found if isinstance(found, list) else [found]
    return frozenset(int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None)


def sampling_defaults(model: Any) -> dict[str, Any]:
    """How the base's makers would have its answers sampled, by their generation config, as in vLLM."""
    config = model.generation_config
    if config is None or not config.do_sample:
        return {}
    found = {name: getattr(config, name, None) for name in PLAIN_SAMPLING}
    return {name: value for name, value in found.items() if value is not None}
