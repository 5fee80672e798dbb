"""Request and what comes out of it, token by token. Values of the engine: token ids and digests, no text, no torch."""

from array import array
from dataclasses import dataclass, field
from enum import Enum

from serve.engine.form import Constraint, Form
from serve.engine.speculate import Drafter

GREEDY_BELOW = 1e-5  # a temperature so low that dividing by it would only overflow
LOW, NORMAL, HIGH = -1, 0, 1  # priorities


class State(Enum):
    """WAITING for pages of the KV cache, RUNNING with some, FINISHED for whatever reason."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    temperature 0 is greedy; top_p, top_k (None: all) and min_p (a share of the likeliest token's probability) cut
    the distribution; `seed` makes it repeatable. `logit_bias` is added to the logits of its tokens. Presence and
    frequency penalties are subtracted from those of tokens already in the answer, once or as often as they came;
    the repetition penalty divides positive and multiplies negative logits of what is in prompt or answer.
    `stop_token_ids` end the answer in the engine, after `min_tokens`; `stop` strings are found where tokens become
    text. `logprobs` is the number of alternatives wanted beside each token's log-probability; None: no
    log-probabilities. `prompt_logprobs` is the same for the tokens of the prompt, behind the first `score_from` places.
    `pooling` (last, mean, cls): an embedding of the prompt is wanted. With `max_tokens` 0 one token is sampled, which
    says that the prompt was computed and is not part of the answer.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    score_from: int = 0
    pooling: str | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def is_penalised(self) -> bool:
        """Whether tokens that came already change what comes next."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of n neighbouring tokens of a prompt, each given all before it; of the unscaled distribution.

    `ranks` count from 1, the likeliest. `tokens` and `values` are the likeliest alternatives, n times `num_best`.
    """

    logprobs: "array[float]"
    ranks: "array[int]"
    num_best: int
    tokens: "array[int]"
    values: "array[float]"


@dataclass(frozen=True, eq=False)
class Submission:
    """What is asked of the engine: one answer, under an id that no other request has. Nothing of it changes."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    adapter: str | None = None  # a content digest that is held in memory for it
    constraint: Constraint | None = None
    salt: str = ""  # only requests with the same one share what is computed of a prompt
    priority: int = NORMAL
    output: tuple[int, ...] = ()  # tokens that it has already, made elsewhere
    seed: int | None = None  # its tokens are drawn by, if the parameters have none


@dataclass(eq=False)
class Request:
    """One answer being made, known to the engine alone. `adapter` is a content digest, or None for the bare base.

    `num_computed` tokens of prompt and output are in `pages` of the KV cache; the first `num_cached` of them were taken
    over from other requests when it was admitted first. The rest is the scheduler's and the page pool's: keys of the
    whole pages, those among them that others may wait for, since which step it is here, and how long it stood at the
    head of the queue. `begun` is when it left the queue first, on the monotonic clock.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    adapter: str | None = None
    constraint: Constraint | None = None
    salt: str = ""  # only requests with the same one share what is computed of a prompt
    priority: int = NORMAL
    output: list[int] = field(default_factory=list)
    state: State = State.WAITING
    num_computed: int = 0
    num_cached: int = 0
    begun: float | None = None
    pages: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    page_keys: list[bytes] = field(default_factory=list)
    in_flight: tuple[bytes, ...] = ()
    since: int = 0
    num_passed: int = 0  # requests that went before
    num_waited: int = 0  # steps
    vector: "array[float]" = field(default_factory=lambda: array("f"))  # an embedding, as far as it is computed
    seed: int | None = None
    scores: list[Scores] = field(default_factory=list)  # of the prompt's tokens from the second, as they are computed
    form: Form | None = field(init=False)
    drafter: Drafter = field(default_factory=Drafter)

    def __post_init__(self) -> None:
        self.form = None if self.constraint is None else Form(self.constraint)

    @classmethod
    def of(cls, asked: Submission) -> "Request":
        """The request that was submitted."""
        return cls(
            asked.id,
            asked.prompt,
            asked.params,
            asked.adapter,
            asked.constraint,
            asked.salt,
            asked.priority,
            list(asked.output),
            seed=asked.seed,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def is_decoding(self) -> bool:
        """Whether all but its newest token is computed: then that was sampled from logits that were finite."""
        return self.num_tokens - self.num_computed == 1

    @property
    def num_unscored(self) -> int:
        """Tokens of the prompt whose log-probabilities are wanted and not known; nobody asks for the first one's."""
        return len(self.prompt) - 1 - self.num_scored if self.params.prompt_logprobs is not None else 0

    @property
    def num_scored(self) -> int:
        """Positions of the prompt, from the first, whose logits are no longer needed."""
        return self.params.score_from + sum(len(part.logprobs) for part in self.scores)

    def tokens(self, start: int, count: int) -> list[int]:
        """Tokens [start, start + count) of prompt and output."""
        inside = len(self.prompt)
        if start >= inside:
            return self.output[start - inside : start - inside + count]
        return [*self.prompt[start : start + count], *self.output[: max(0, start + count - inside)]]


@dataclass(frozen=True)
class Scheduled:
    """Tokens [start, start + num_tokens) of a request, to be computed in this step.

    The last of them are `draft`, guesses at what comes after the tokens that are known.
    """

    request: Request
    start: int
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def tokens(self) -> list[int]:
        return [*self.request.tokens(self.start, self.num_tokens - len(self.draft)), *self.draft]

    @property
    def wants_token(self) -> bool:
        """Whether the last token known so far is among them, so that the next one can be sampled."""
        return self.end - len(self.draft) == self.request.num_tokens

    @property
    def num_choices(self) -> int:
        """After how many of its last tokens one may be sampled: after the newest known one, and after each guess."""
        return 1 + len(self.draft) if self.wants_token else 0

    @property
    def scored(self) -> range:
        """Positions among them whose logits score the next token of the prompt, if that is asked for and not done."""
        if self.request.params.prompt_logprobs is None:
            return range(0)
        return range(max(self.start, self.request.num_scored), min(self.end, len(self.request.prompt) - 1))


@dataclass(frozen=True)
class Sampled:
    """A chosen token; log-probabilities (natural, of the unscaled distribution) only if they were asked for."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptOutput:
    """What is known of a prompt once it is computed: how many of its tokens others had computed, when it left the
    queue, and the log-probabilities of those from the second, and its embedding, if they are wanted."""

    num_cached: int = 0
    begun: float | None = None  # time.monotonic()
    scores: tuple[Scores, ...] = ()
    vector: "array[float] | None" = None


@dataclass(frozen=True)
class TokenOutput:
    """What one step gave of one request: a token, or the error that ended it; with the first token, its prompt's."""

    request_id: str
    sampled: Sampled | None
    finish_reason: str | None = None
    error: Exception | None = None
    prompt: PromptOutput | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None
