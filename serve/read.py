"""Read: what the body of a request asks for, as prompts, parameters and grammars. No adapter, and nothing runs yet."""

from dataclasses import dataclass

from adapterhub_local.base.chat_settings import ChatSettings
from adapterhub_local.base.load import LoadedBase
from adapterhub_local.base.tool_calls import CallReader
from adapterhub_local.base.tool_format import ToolFormat
from serve.answers.logprobs import MAX_NUMBERS, Echo
from serve.engine.engine import Engine
from serve.engine.form import Constraint
from serve.engine.request import SamplingParams
from serve.errors import BadParameter, Busy, ContextTooLong
from serve.requests.generation import ALL, DEFAULT_COMPLETION_TOKENS, ChatRequest, CompletionRequest, GenerationRequest
from serve.requests.messages import ToolChoice
from serve.requests.probes import EmbeddingsRequest, ScoreRequest
from serve.text.grammar import GrammarReader, after_thoughts, answer_grammar, structured_grammar
from serve.text.prompt import PLAIN, PromptReader, end_tokens, sampling_defaults
from serve.text.thoughts import Place, ThoughtBound, ThoughtFormat, ThoughtReader


@dataclass(frozen=True)
class Choice:
    """One answer that is asked for: what stands before it, how it is made, what finds calls and
    thoughts in it, what it echoes."""

    name: str  # among those of its request
    prompt: tuple[int, ...]
    params: SamplingParams
    constraint: Constraint | None = None
    calls: CallReader | None = None
    thoughts: ThoughtReader | None = None
    echo: Echo | None = None


class BodyReader:
    """Reads bodies for one base, within the limits of its engine and of the server."""

    def __init__(self, base: LoadedBase, engine: Engine, max_tokens: int | None) -> None:
        self.engine = engine
        self.max_tokens = max_tokens  # of one answer; None: what the context has room for
        self.vocabulary_size = base.model.get_input_embeddings().weight.shape[0]
        self.prompts = PromptReader(base.tokenizer, self.vocabulary_size, engine.max_length)
        self.end_tokens = end_tokens(base.model, base.tokenizer)
        self.defaults = sampling_defaults(base.model)
        self.grammars = GrammarReader(base.tokenizer, self.vocabulary_size, self.end_tokens)

    def probes(self, body: EmbeddingsRequest | ScoreRequest, settings: ChatSettings = PLAIN) -> list[Choice]:
        """The prompts whose embeddings or scores `body` asks for. Raises as `choices`."""
        prompts, starts, param = self._probed(body, settings)
        if len(prompts) > self.engine.options.queue_limit:
            raise Busy(f"{len(prompts)} texts are more than the queue holds")
        pooling = body.pooling if isinstance(body, EmbeddingsRequest) else None
        is_scored = pooling != "last"
        choices = []
        for index, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            params = SamplingParams(
                0, 0.0, prompt_logprobs=0 if is_scored else None, score_from=max(0, start - 1), pooling=pooling
            )
            try:
                self.engine.check_length(len(prompt), 0)
            except ContextTooLong as error:
                error.param = param
                raise
            choices.append(Choice(f"{index}", prompt, params))
        return choices

    def _probed(
        self, body: EmbeddingsRequest | ScoreRequest, settings: ChatSettings
    ) -> tuple[list[tuple[int, ...]], list[int], str]:
        """The prompts, from which token on each is scored, and the parameter that they come from."""
        if isinstance(body, EmbeddingsRequest):
            prompts = [self.prompts.plain(text) for text in body.texts]
            return prompts, [0] * len(prompts), "input"
        if body.messages is None:
            before = self.prompts.plain(body.prompt) if body.prompt else ()
            whole = [self.prompts.plain(f"{body.prompt}{choice}") for choice in body.choices]
            # a token may reach over the border: then it belongs to the answer
            starts = [next((n for n, (a, b) in enumerate(zip(before, own, strict=False)) if a != b),
                           min(len(before), len(own) - 1)) for own in whole]  # fmt: skip
            return whole, [max(1, start) for start in starts], "prompt"
        prompt = self.prompts.chat(body.messages, (), body.chat_template_kwargs or {}, settings=settings)
        answers = [self.prompts.plain(choice, add_special_tokens=False) for choice in body.choices]
        return [(*prompt, *answer) for answer in answers], [len(prompt)] * len(answers), "messages"

    def choices(self, body: GenerationRequest, settings: ChatSettings = PLAIN) -> list[Choice]:
        """The answers that `body` asks for, those to one prompt beside each other.

        `settings`: how the adapter that answers was trained to be spoken to.

        Raises BadParameter, ContextTooLong, and Busy if they are more than ever fit into the queue.
        """
        num_prompts = len(body.prompts) if isinstance(body, CompletionRequest) else 1
        if num_prompts * body.num_choices > self.engine.options.queue_limit:
            raise Busy(f"{num_prompts} prompts with {body.num_choices} answers each are more than the queue holds")
        prompts, echoes, tool_format = self._prompts(body, settings)
        thinking = self._thinking(body, settings)
        places = [thinking.place(self.prompts.tokenizer, prompt) if thinking else Place.PAST for prompt in prompts]
        grammar, param = _grammar(body, tool_format)
        if thinking is not None and grammar is not None:
            if thinking.can_precede_forms and grammar.startswith("start: ") and not _is_own_grammar(body):
                grammar = after_thoughts(grammar, thinking, places[0])
            elif places[0] is Place.INSIDE:  # a form that cannot come after thoughts: there are none
                prompts, places = [self.prompts.closed(prompts[0], thinking)], [Place.PAST]
        _check_numbers(body, sum(map(len, prompts)) * body.num_choices)
        count = len(prompts) * body.num_choices
        constraints: list[Constraint | None] = [None] * count
        if grammar is not None:
            constraints = [*self.grammars.constraints(grammar, count, param)]
        choices = []
        for index, prompt in enumerate(prompts):
            max_tokens = self._max_tokens(body, len(prompt))
            for number in range(body.num_choices):
                params = body.sampling_params(number, max_tokens, self.end_tokens, self.defaults)
                self._check_tokens(params)
                constraint = constraints[index * body.num_choices + number]
                thoughts = ThoughtReader(thinking, places[index]) if thinking is not None else None
                if thoughts is not None and isinstance(body, ChatRequest) and body.max_thoughts is not None:
                    constraint = self._bound(thoughts, body.max_thoughts, constraint)
                calls = _call_reader(body, tool_format)
                echo = echoes[index] if echoes else None
                choices.append(Choice(f"{index}.{number}", prompt, params, constraint, calls, thoughts, echo))
        return choices

    def prompt(self, body: ChatRequest, settings: ChatSettings = PLAIN) -> tuple[int, ...]:
        """Tokens of a chat's prompt. Raises BadParameter, ContextTooLong."""
        effort = "none" if body.max_thoughts == 0 else body.reasoning_effort
        variables = self.prompts.switches(effort, body.callable_tools, settings) if effort is not None else {}
        return self.prompts.chat(
            body.messages,
            body.callable_tools,
            variables | (body.chat_template_kwargs or {}),
            continues=body.continues,
            begins_answer=body.begins_answer,
            parse_special=body.parse_special,
            settings=settings,
        )

    def _thinking(self, body: GenerationRequest, settings: ChatSettings) -> ThoughtFormat | None:
        """How the thoughts of the answer are marked, if it may have some."""
        return self.prompts.thoughts(body.callable_tools, settings) if isinstance(body, ChatRequest) else None

    def _bound(self, thoughts: ThoughtReader, limit: int, inner: Constraint | None) -> Constraint | None:
        """What ends the thoughts of an answer after this many tokens."""
        if thoughts.place is Place.PAST:
            return inner
        tokenizer = self.prompts.tokenizer
        return ThoughtBound(tokenizer, thoughts.form, thoughts.place, limit, self.vocabulary_size, inner)

    def _prompts(
        self, body: GenerationRequest, settings: ChatSettings
    ) -> tuple[list[tuple[int, ...]], list[Echo], ToolFormat | None]:
        """Tokens of each prompt, what of them to give back, and how tools are called if they may be."""
        if isinstance(body, ChatRequest):
            tool_format = self.prompts.tool_format(body.messages, body.callable_tools, settings)
            return [self.prompt(body, settings)], [], tool_format
        assert isinstance(body, CompletionRequest)
        tokens = [self.prompts.plain(each, add_special_tokens=body.add_special_tokens) for each in body.prompts]
        if not body.echo:
            return tokens, [], None
        texts = [prompt if isinstance(prompt, str) else self.prompts.text(prompt) for prompt in body.prompts]
        has_offsets = body.logprobs is not None
        offsets = [
            self.prompts.offsets(text, own) if has_offsets else () for text, own in zip(texts, tokens, strict=True)
        ]
        return tokens, [Echo(*each) for each in zip(texts, offsets, strict=True)], None

    def _max_tokens(self, body: GenerationRequest, num_prompt: int) -> int:
        """The longest answer wanted, by default what the context has room for. Raises ContextTooLong."""
        wanted = body.max_tokens
        room = max(1, self.engine.max_length - num_prompt)
        limit = self.max_tokens
        if isinstance(body, ChatRequest):
            wanted = body.max_completion_tokens or wanted or ALL
            if body.is_clamped:  # where clients have to give a bound, they give a large one
                wanted = min(wanted, room, limit or room)
        if wanted == ALL:
            wanted = min(room, limit or room)
        if wanted is None:
            wanted = min(DEFAULT_COMPLETION_TOKENS, limit or DEFAULT_COMPLETION_TOKENS)
        if limit is not None and wanted > limit:
            raise BadParameter(f"an answer may have {limit} tokens here, {wanted} were asked for", "max_tokens")
        try:
            self.engine.check_length(num_prompt, wanted)
        except ContextTooLong as error:
            error.param = "messages" if isinstance(body, ChatRequest) else "prompt"
            raise
        return wanted

    def _check_tokens(self, params: SamplingParams) -> None:
        """Raise BadParameter about tokens that the base does not have."""
        for param, tokens in (
            ("logit_bias", [token for token, _ in params.logit_bias]),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if any(token >= self.vocabulary_size for token in tokens):
                message = f"{param}: token {max(tokens)} is not one of the base's {self.vocabulary_size}"
                raise BadParameter(message, param)
        if params.min_tokens > params.max_tokens:
            raise BadParameter(
                f"min_tokens is {params.min_tokens}, more than max_tokens {params.max_tokens}", "min_tokens"
            )


def _check_numbers(body: GenerationRequest, num_tokens: int) -> None:
    """Raise BadParameter unless the log-probabilities of this many tokens of prompts fit into one answer."""
    if body.prompt_alternatives is None:
        return
    numbers = num_tokens * (body.prompt_alternatives + 1)
    if numbers > MAX_NUMBERS:
        raise BadParameter(
            f"log-probabilities of {num_tokens:,} tokens of prompts with {body.prompt_alternatives} alternatives each "
            f"are {numbers:,} numbers, and one answer may have {MAX_NUMBERS:,}: ask for fewer prompts at once",
            "prompt_logprobs" if body.prompt_logprobs is not None else "logprobs",
        )


def _grammar(body: GenerationRequest, tool_format: ToolFormat | None) -> tuple[str | None, str]:
    """The grammar of the answer, if it has to have a form, and the parameter that asks for it."""
    if body.structured_outputs is not None:
        return structured_grammar(body.structured_outputs), "structured_outputs"
    form = body.response_format
    schema = form.schema_of_answer if form is not None and form.is_json else None
    if not isinstance(body, ChatRequest):
        return answer_grammar(schema), "response_format"
    # who has to call would go on calling until the answer is cut: one call, unless more are asked for
    is_parallel = body.parallel_tool_calls is True and not isinstance(body.tool_choice, ToolChoice)
    grammar = answer_grammar(schema, body.callable_tools, tool_format, body.must_call, is_parallel)
    return grammar, "tools" if body.must_call else "response_format"


def _is_own_grammar(body: GenerationRequest) -> bool:
    """Whether the request brings a grammar, whose rules have names of their own."""
    return body.structured_outputs is not None and body.structured_outputs.grammar is not None


def _call_reader(body: GenerationRequest, tool_format: ToolFormat | None) -> CallReader | None:
    """What finds the calls in an answer that may call."""
    if not isinstance(body, ChatRequest) or tool_format is None or not body.callable_tools:
        return None
    names = [tool.function.name for tool in body.callable_tools]
    is_parallel = body.parallel_tool_calls is not False
    return CallReader(tool_format, names, is_parallel=is_parallel, must_call=body.must_call)
