"""Answers of a given form: a JSON schema or the calls of tools become a constraint on the next token (llguidance)."""

import json
import re
import threading
from collections.abc import Sequence, Set
from copy import copy
from typing import Any

from llguidance import LLMatcher
from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.tool_format import ToolFormat
from serve.engine.sampler import NothingAllowed
from serve.errors import BadParameter
from serve.requests.messages import StructuredOutputs, Tool
from serve.text.compiler import FormCompiler
from serve.text.form_bounds import bound_choices, bound_form, bound_pattern, bound_rules, bound_schema
from serve.text.thoughts import AFTER, Place, ThoughtFormat

MAX_PARALLEL = 8  # calls in one answer that has to call: a small model would repeat itself until it is cut
# Bounded, or a small model fills its answer with blanks and never comes to the point.
JSON_SPACE = r"[ \n\t]{0,20}"
CALL_SPACE = r"[ ]?"  # as chat templates write calls
# What may speak of properties that `properties` does not name.
OPEN_OBJECT = {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref"}


class Grammar:
    """A constraint of one answer."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._num_after = 0  # tokens that came after the end of the form

    def allowed(self) -> bytes:
        """One byte a token of the vocabulary, 0 where the token may not come next. Raises NothingAllowed."""
        allowed = self._matcher.compute_logit_bias()
        self._check()
        return allowed

    def advance(self, token: int) -> None:
        """Note that `token` came; after the end of the form only tokens that end the answer are allowed."""
        if self._matcher.is_stopped():
            self._num_after += 1
        else:
            self._matcher.consume_token(token)
        self._check()

    def rollback(self, count: int) -> None:
        """Take the last `count` tokens back."""
        after = min(count, self._num_after)
        self._num_after -= after
        self._matcher.rollback(count - after)

    def forced(self) -> list[int]:
        """Tokens that must come next. Raises NothingAllowed."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _first_line(self._matcher.get_error())
            raise NothingAllowed(f"the answer cannot be continued in the form that was asked for: {reason}")


class GrammarReader:
    """Grammars over one tokenizer's vocabulary, which is read when the first is asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int, end_tokens: Set[int]) -> None:
        self._source = tokenizer
        self._vocabulary_size = vocabulary_size
        self._end_tokens = sorted(end_tokens)
        self._compiler: FormCompiler | None = None
        self._lock = threading.Lock()

    def constraints(self, grammar: str, count: int, param: str) -> list[Grammar]:
        """`count` equal constraints that have seen no token yet.

        Raises BadParameter about `param` if the grammar cannot be used, Busy if too many forms are being read.
        """
        bound_form(grammar, param)
        try:
            matcher = self._ready(param).matcher(grammar)
        except ValueError as error:
            raise BadParameter(f"this form cannot be used: {_first_line(str(error))}", param) from None
        return [Grammar(matcher.deep_copy() if number else matcher) for number in range(count)]

    def close(self) -> None:
        """End what compiles."""
        with self._lock:
            if self._compiler is not None:
                self._compiler.close()

    def _ready(self, param: str) -> FormCompiler:
        with self._lock:
            if self._compiler is None:
                if not self._source.is_fast or not self._end_tokens:
                    raise BadParameter("this base's tokenizer cannot be used for answers of a given form", param)
                source: Any = self._source
                backend = copy(source.backend_tokenizer)
                backend.no_padding()
                backend.no_truncation()
                self._compiler = FormCompiler(backend.to_str(), self._vocabulary_size, self._end_tokens)
            return self._compiler


def answer_grammar(
    schema: dict[str, Any] | None,
    tools: Sequence[Tool] = (),
    tool_format: ToolFormat | None = None,
    must_call: bool = False,
    is_parallel: bool = False,
) -> str | None:
    """The grammar of an answer: JSON of `schema`, calls of `tools`, or either; None if any text will do.

    Where calls are only allowed, not asked for, text decides for itself unless it has to be JSON. Raises BadParameter
    about a schema that is too large.
    """
    forms = []
    if schema is not None and not must_call:
        bound_schema(schema, "response_format")
        forms.append(_json_rule(schema))
    if tool_format is not None and (must_call or (forms and tools)):
        for tool in tools:
            bound_schema(tool.function.parameters or {}, "tools")
        call = _json_rule(
            {"anyOf": [_call_schema(place, tool, tool_format) for place, tool in enumerate(tools)]}, CALL_SPACE
        )
        if tool_format.begin:
            call = f"{_literal(tool_format.begin)} {call} {_literal(tool_format.end)}"
            call += f' ("\\n" {call}){{0,{MAX_PARALLEL - 1}}}' if is_parallel else ""
        forms.append(call)
    if not forms:
        return None
    return LLMatcher.grammar_from_lark("start: " + "\n  | ".join(forms))


def after_thoughts(grammar: str, form: ThoughtFormat, place: Place) -> str:
    """A grammar for what comes after the thoughts of an answer that begins in this place: in them, or before.

    `grammar` is one of Lark's that begins with its rule `start`.
    """
    if place is Place.PAST:
        return grammar
    begin = f"<[{form.ids[form.begin]}]>" if form.begin in form.ids else _literal(form.begin)
    thoughts = f"thoughts[suffix={_literal(form.end)}]: /(.|\\n)*/"
    if form.end in form.ids:  # a token of its own is no text to the grammar
        thoughts = f"thoughts: /(.|\\n)*/ <[{form.ids[form.end]}]>"
    before = f"thoughts {_literal(AFTER)}"
    if place is Place.BEFORE:
        before = f"({begin} {before})?"
    return f"start: {before} answer\n{thoughts}\nanswer: {grammar.partition('start: ')[2]}"


def structured_grammar(wanted: StructuredOutputs) -> str:
    """The grammar of an answer that is given in one of vLLM's ways; it is checked when it is used.

    Raises BadParameter about one that is too large.
    """
    param = "structured_outputs"
    if wanted.regex is not None:
        bound_pattern(wanted.regex, param)
        return str(json.loads(LLMatcher.grammar_from_regex(wanted.regex))["grammars"][0]["lark_grammar"])
    if wanted.grammar is not None:
        bound_rules(wanted.grammar, param)
        return LLMatcher.grammar_from_lark(wanted.grammar)
    if wanted.choice is not None:
        bound_choices(wanted.choice, param)
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_literal, wanted.choice)))
    schema = {"type": "object"} if wanted.json_ is None else wanted.json_
    bound_schema(schema, param)
    return LLMatcher.grammar_from_lark("start: " + _json_rule(schema))


def _call_schema(place: int, tool: Tool, tool_format: ToolFormat) -> dict[str, Any]:
    parameters = tool.function.parameters or {"type": "object", "properties": {}}
    if not parameters.keys() & OPEN_OBJECT:
        parameters = parameters | {"additionalProperties": False}  # a tool knows no argument but those it declares
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            tool_format.key: _moved(parameters, f"#/anyOf/{place}/properties/{tool_format.key}"),
        },
        "required": ["name", tool_format.key],
        "additionalProperties": False,
    }


def _moved(part: Any, root: str) -> Any:
    """A schema that stands at `root` of another: what it refers to in itself is there now."""
    if isinstance(part, list):
        return [_moved(each, root) for each in part]
    if not isinstance(part, dict):
        return part
    return {
        key: root + value[1:] if key == "$ref" and isinstance(value, str) and value[:1] == "#" else _moved(value, root)
        for key, value in part.items()
    }


def _json_rule(schema: dict[str, Any], space: str = JSON_SPACE) -> str:
    return "%json " + json.dumps(schema | {"x-guidance": {"whitespace_pattern": space}})


def _literal(text: str) -> str:
    # JSON leaves these as they are, the grammar's lexer takes none of them bare
    return re.sub(r"[\x7f-\x9f\u2028\u2029]", lambda it: f"\\u{ord(it[0]):04x}", json.dumps(text, ensure_ascii=False))


def _first_line(text: str) -> str:
    """What an error of the library says first; the state of its parser follows."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    return (errors or lines or ["unknown"])[0][:300]
