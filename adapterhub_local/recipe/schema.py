"""The tables of a recipe and their keys, each with its unit, default and limits."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass

from adapterhub_local.errors import BadReference
from adapterhub_local.recipe.field import Check, at_least_one, between, key, one_of
from adapterhub_local.recipe.objectives import OBJECTIVES, Preference
from adapterhub_local.recipe.reward import Reward
from adapterhub_local.recipe.source import Source
from adapterhub_local.refs import Reference, check_alias, check_name
from adapterhub_local.settings import COMPUTE

KERNELS = ("auto", "liger", "torch")
OPTIMIZERS = ("auto", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
STRATEGIES = ("manual", "auto")
CHECKPOINTING = (False, True, "offload")
FORMATS = ("auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text", "preference", "judged")
TEMPLATES = ("auto", "chat", "plain")
LOSS_ON = ("answer", "last_answer", "all")
TOO_LONG = ("error", "truncate", "skip")
SYSTEM_ROLES = ("system", "user")
CONTROL_TOKENS = ("text", "tokens")
LEFT_OUT = ("error", "accept")
BAD_ROWS = ("error", "skip")
MAX_NEW_TOKENS = 256  # of an answer that is written to be looked at
ROLES = ("system", "user", "assistant", "tool")
COLUMNS = (
    *("messages", "tools", "system", "prompt", "completion", "instruction", "input", "output", "history", "text"),
    *("conversations", "role", "content", "chosen", "rejected", "label"),
)
INITS = ("default", "gaussian", "eva")
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq")


def _named(check: Callable[[str], str]) -> Callable[[str], str | None]:
    def problem(value: str) -> str | None:
        try:
            check(value)
        except BadReference as error:
            return str(error)
        return None

    return problem


def _targets(value: str | tuple[str, ...]) -> str | None:
    # PEFT would take any other text as a pattern
    if value and not (isinstance(value, str) and value not in ("all-linear", "attention", "mlp")):
        return None
    return "must be 'all-linear' or a list, or one of the groups 'attention' and 'mlp'"


def _base(value: str) -> str | None:
    wrong = _named(check_name)(value)
    return wrong and f"{wrong}. `qhub base add NAME SOURCE` gives a model a name, `qhub base list` shows them"


@dataclass(frozen=True)
class Base:
    name: str = key("the base to train against, as `qhub base list` shows it", check=_base)


def _weights(value: tuple[float, ...]) -> str | None:
    return None if value and all(0 < weight <= 100 for weight in value) else "must be numbers above 0, up to 100"


def _date(value: str) -> str | None:
    try:
        datetime.date.fromisoformat(value)
    except ValueError:
        return "must be a day such as 2026-01-31"
    return None


def _roles(value: dict[str, str]) -> str | None:
    return (
        None if value and set(value.values()) <= set(ROLES) else f"must say of each which of {', '.join(ROLES)} it is"
    )


def _columns(value: dict[str, str]) -> str | None:
    if value and set(value) <= set(COLUMNS):
        return None
    return f"must say what some of these are called in the data: {', '.join(COLUMNS)}"


def _labels(value: dict[str, tuple[str, ...] | dict[str, str]]) -> str | None:
    return None if value and all(value.values()) else "must give the names of at least one column's values"


Value = str | bool | int | float


@dataclass(frozen=True)
class Data:
    train: tuple[Source, ...] = key(
        "examples to train on: a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt; also .gz, .bz2, .xz, .zst), "
        "a folder of them, a pattern (data/*.jsonl), a Hub dataset (ORG/NAME or "
        "hf://datasets/ORG/NAME@REVISION/FILE), or a list of these; paths are relative to the recipe"
    )
    test: tuple[Source, ...] | None = key("held-out examples to evaluate on, as `train`", None)
    test_share: float = key(
        "share of `train` that is held out if there is no `test`, chosen by a hash of the prompt; 0 holds out nothing",
        0.05,
        between(0, 0.9),
    )
    weights: tuple[float, ...] | None = key(
        "one number for each file of `train`, how often it is seen in an epoch: 2 is twice, 0.5 a half of it",
        None,
        Check(_weights, {"items": {"type": "number", "exclusiveMinimum": 0, "maximum": 100}}),
    )
    limit: int | None = key("train on only this many examples of each file, from its start", None, at_least_one)
    format: str = key(
        f"what an example looks like: {', '.join(FORMATS)}; auto recognises it and says so", "auto", one_of(*FORMATS)
    )
    columns: dict[str, str] | None = key(
        f"what columns are called in the data, such as {{ messages = 'dialog', role = 'speaker' }}; known are "
        f"{', '.join(COLUMNS)}",
        None,
        Check(_columns, {"propertyNames": {"enum": COLUMNS}}),
    )
    roles: dict[str, str] | None = key(
        "which of ours a role of the data is, such as { visitor = 'user', agent = 'assistant' }; human, gpt, model, "
        "developer, observation and their like are known",
        None,
        _roles,
    )
    labels: dict[str, tuple[str, ...] | dict[str, str]] | None = key(
        "the names of a column's numbers, such as { label = ['negative', 'positive'] } or { label = { 1 = 'spam' } }",
        None,
        _labels,
    )
    bad_rows: str = key(
        f"rows that cannot be used: {', '.join(BAD_ROWS)}; what is left out is counted and reported",
        "error",
        one_of(*BAD_ROWS),
    )
    prompt: str | None = key(
        "the prompt made of columns, such as `Classify: {text}`; needs `answer`; {{ and }} are braces", None
    )
    answer: str | None = key("the answer made of columns, such as `{label}`; needs `prompt`", None)
    system: str | None = key("the system message made of columns; needs `prompt` and `answer`", None)
    template: str = key(
        "how turns are written: chat (the base's chat template), plain (prompt and answer as they are, one after the "
        "other), or auto (chat; plain where the base has no template and an example is a prompt and an answer)",
        "auto",
        one_of(*TEMPLATES),
    )
    chat_template: str | None = key(
        "another chat template than the base's: a .jinja file, the name of one of the base's, or chatml, llama3, "
        "gemma, zephyr, alpaca; kept with the version, and the server uses it",
        None,
    )
    template_args: dict[str, Value] | None = key(
        "variables of the chat template, such as { enable_thinking = false }; kept, and the server's default", None
    )
    system_role: str = key(
        "where system messages go: system (as the template has it), or user (before the text of the user's next "
        "message); kept, and the server does the same",
        "system",
        one_of(*SYSTEM_ROLES),
    )
    control_tokens: str = key(
        "control tokens that a text spells are: text (as the server writes them), or tokens (ready-made marks)",
        "text",
        one_of(*CONTROL_TOKENS),
    )
    left_out: str = key(
        f"what the chat template leaves out of an example (thoughts, system messages, tools): {', '.join(LEFT_OUT)}",
        "error",
        one_of(*LEFT_OUT),
    )
    date: str | None = key(
        "the day that a chat template prints which prints today's, such as 2026-01-31; always the same if not given",
        None,
        _date,
    )
    loss_on: str = key(
        "what is learned: answer (every turn of the assistant), last_answer, or all (every token)",
        "answer",
        one_of(*LOSS_ON),
    )
    max_length: int = key("longest example in tokens", 1024, between(8, 2**20))
    too_long: str = key(
        f"a longer example is: {', '.join(TOO_LONG)}; cuts are counted and reported; plain text is cut in pieces",
        "error",
        one_of(*TOO_LONG),
    )


def _version(value: str) -> str | None:
    try:
        Reference.parse(value)
    except BadReference as error:
        return str(error)
    return None


def _init(value: str) -> str | None:
    if value in MOVES_THE_BASE:
        return (
            "starts from a changed base, which is shared here and stays as it is: the residual would be lost with the "
            "run. Use default, gaussian or eva"
        )
    return one_of(*INITS)(value)


def _ranks(value: dict[str, int]) -> str | None:
    return None if value and all(1 <= rank <= 4096 for rank in value.values()) else "must be ranks from 1 to 4096"


def _tokens(value: tuple[str, ...]) -> str | None:
    if not value:
        return "must name at least one token"
    twice = next((token for token in value if value.count(token) > 1), None)
    return f"names '{twice}' twice" if twice is not None else None


def _checkpointing(value: bool | str) -> str | None:
    return None if value in CHECKPOINTING else "must be true, false or 'offload'"


def _alphas(value: dict[str, float]) -> str | None:
    return None if value and all(0 < alpha <= 1e6 for alpha in value.values()) else "must be positive numbers"


@dataclass(frozen=True)
class Adapter:
    rank: int = key("rank r of the factors A (r x in) and B (out x r)", 16, between(1, 4096))
    alpha: float = key("scaling is alpha / rank", 32.0, between(1e-6, 1_000_000))
    rslora: bool = key("scaling is alpha / sqrt(rank) instead", False)
    dropout: float = key("share of inputs to A dropped in training", 0.0, between(0, 0.99))
    target_modules: str | tuple[str, ...] = key(
        "`all-linear` (all but the output head), `attention`, `mlp`, or a list of these two and ends of module names",
        "all-linear",
        _targets,
    )
    dtype: str = key(
        "what the factors are trained and stored in: float32 or bfloat16", "float32", one_of("float32", "bfloat16")
    )
    init: str = key(
        "how A begins (B is zero): default (uniform), gaussian, or eva (what explains most of the layers' inputs)",
        "default",
        Check(_init, {"enum": INITS}),
    )
    dora: bool = key("train a magnitude for each row as well (DoRA): slower, and merged by --with-base only", False)
    rank_pattern: dict[str, int] | None = key(
        "other ranks by end of module name, such as `{ q_proj = 32 }`; regular expressions, as in PEFT", None, _ranks
    )
    alpha_pattern: dict[str, float] | None = key("other alphas, in the same way", None, _alphas)
    train_tokens: tuple[str, ...] | None = key(
        "tokens of the base whose rows of the input embeddings are trained too, and of the head where it shares them, "
        "such as ['<unused1>', '<think>']; kept with the adapter, and the base stays as it is",
        None,
        _tokens,
    )
    from_: str | None = key(
        "train on from this version, such as `sql@3`; rank, alpha, rslora, dora, patterns, train_tokens and "
        "target_modules are its",
        None,
        _version,
    )


@dataclass(frozen=True)
class Train:
    strategy: str = key(
        "auto chooses what the recipe does not give, for model, device and data, and says why: rank, alpha, learning "
        "rate, batch size, optimizer, packing, checkpointing; manual takes the defaults",
        "manual",
        one_of(*STRATEGIES),
    )
    objective: str = key(
        f"what is minimised: {', '.join(OBJECTIVES)}; sft learns answers, kto from answers judged good or bad, grpo "
        "from rewards of answers that the model draws, the others from an answer chosen over another to its prompt",
        "sft",
        one_of(*OBJECTIVES),
    )
    epochs: float = key("passes over the training data", 1.0, between(0.001, 10_000))
    max_steps: int | None = key(
        "train for this many optimizer steps instead, repeating the data as needed", None, at_least_one
    )
    batch_size: int = key("examples per optimizer step", 16, at_least_one)
    micro_batch_size: int | None = key(
        "examples per forward pass at most, a divisor of batch_size; fewer take less memory", None, at_least_one
    )
    packed_tokens: int = key(
        "tokens of a forward pass that several examples share at most; 0 computes each example alone",
        1024,
        between(0, 2**24),
    )
    activation_checkpointing: bool | str = key(
        "true computes activations again in the backward pass: a third more time, far less memory; offload, on a GPU, "
        "keeps in the host's memory what is left of them, and input embeddings that the head does not share, and "
        "computes MLPs in parts of a row",
        False,
        Check(_checkpointing, {"enum": CHECKPOINTING}),
    )
    learning_rate: float = key("peak learning rate", 5e-4, between(1e-9, 1))
    schedule: str = key(
        f"learning rate over time: {', '.join(SCHEDULES)}; wsd stays at its peak and falls at the end (`decay`)",
        "cosine",
        one_of(*SCHEDULES),
    )
    warmup: float = key("share of the steps in which the learning rate rises", 0.05, between(0, 1))
    decay: float = key("share of the steps in which it falls at the end, for the schedule wsd", 0.2, between(0, 1))
    min_rate: float = key("share of the peak at which it ends, for cosine, linear and wsd", 0.0, between(0, 1))
    loraplus_ratio: float | None = key(
        "learning rate of B over that of A (LoRA+, which found 16 good); equal if not given",
        None,
        between(0.001, 1000),
    )
    weight_decay: float = key("decoupled weight decay of A and B", 0.0, between(0, 10))
    max_grad_norm: float = key("gradients are clipped to this norm", 1.0, between(1e-6, 1_000_000))
    optimizer: str = key(
        f"{', '.join(OPTIMIZERS)}; auto is paged_adamw_8bit on a GPU and adamw on the CPU, "
        "where paging does nothing and 8-bit states only cost time",
        "auto",
        one_of(*OPTIMIZERS),
    )
    compute: str = key(
        "dtype of activations: float32, bfloat16, or auto (QHUB_COMPUTE, or bfloat16 if the hardware multiplies it)",
        "auto",
        one_of(*COMPUTE),
    )
    kernels: str = key(
        "what computes a base's norms, rotary embeddings and MLPs on a GPU: liger (of `adapterhub-local[gpu]`), torch, "
        "or auto, Liger where it is installed and the base answers the same",
        "auto",
        one_of(*KERNELS),
    )
    eval_every: int | None = key(
        "steps between evaluations on data.test; the adapter of the lowest loss is the result", None, at_least_one
    )
    patience: int | None = key(
        "stop after this many evaluations in a row without a lower loss; needs eval_every", None, at_least_one
    )
    save_every: int | None = key(
        "steps between saves of the state to resume from; every five minutes if not given", None, at_least_one
    )
    seed: int = key("decides initial factors, order of examples and dropout", 0, between(0, 2**32 - 1))


@dataclass(frozen=True)
class Eval:
    samples: int = key("held-out prompts answered before and after, for the report", 3, between(0, 100))
    limit: int | None = key("evaluate on only this many test examples, from the first", None, at_least_one)
    batch_size: int = key("examples per forward pass", 16, at_least_one)
    tool_calls: bool = key(
        "score the calls of tools that base and adapter write: their form, the tools, and the arguments; for sft, grpo",
        False,
    )
    max_new_tokens: int = key("most tokens of an answer that is written for that", MAX_NEW_TOKENS, between(1, 2**16))


@dataclass(frozen=True)
class Output:
    name: str = key("the adapter's name in the registry", check=_named(check_name))
    alias: str | None = key("alias to point to the new version", None, _named(check_alias))
    task: str | None = key("what the metrics are filed under; the adapter's name if not given", None)
    description: str = key("one line for people", "")


TABLES: dict[str, type] = {
    "base": Base,
    "data": Data,
    "adapter": Adapter,
    "train": Train,
    "preference": Preference,
    "reward": Reward,
    "eval": Eval,
    "output": Output,
}
