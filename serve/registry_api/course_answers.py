"""What runs, jobs, recipes, keys and the server answer, as /openapi.json describes it."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from serve.registry_api.answers import Answer


class JobAnswer(Answer):
    """A command of `qhub` that the server started; `result` is the JSON that it printed, null until then."""

    id: str
    kind: str
    command: list[str]
    state: Literal["running", "done", "failed", "cancelled"]
    cancel_asked: bool
    seconds: float
    result: Any
    error: str | None


class JobList(Answer):
    """Every job that is kept, the newest first, without results."""

    object: Literal["list"]
    data: list[JobAnswer]


class Run(Answer):
    """A training run; a step, a loss or a time is null until it is known."""

    id: str
    name: str | None
    base: str | None
    status: Literal["running", "finished", "stopped", "failed", "crashed"]
    can_resume: bool
    step: int
    steps: int | None
    loss: float | None
    eval_loss: float | None
    version: str | None = Field(description="What it made")
    reason: str | None
    started_at: str | None


class RunList(Answer):
    """A page of runs, the newest first; `after` leads to the next one, null on the last."""

    object: Literal["list"]
    data: list[Run]
    total: int
    after: str | None


class RunAnswer(Run):
    """A run with a part of its log; `next` is the `offset` at which it goes on."""

    log: list[dict[str, Any]]
    next: int


class StoppedRun(Run):
    """A run that was asked to stop."""

    stop_asked: bool


class KeyEntry(Answer):
    """An API key without its secret; no adapters are all."""

    id: str
    scopes: list[str]
    created_at: str
    note: str | None
    adapters: list[str]
    rate: str | None
    concurrency: int | None
    expires_at: str | None
    revoked_at: str | None
    priority: str
    is_valid: bool


class KeyList(Answer):
    """Every key, revoked ones included, the newest first."""

    object: Literal["list"]
    data: list[KeyEntry]


class RecipeEntry(Answer):
    """A recipe of the machine, with what it makes, or why it cannot be used."""

    recipe: str
    name: str | None
    base: str | None
    problem: str | None


class RecipeList(Answer):
    """The recipes that can be started."""

    object: Literal["list"]
    data: list[RecipeEntry]


class Served(Answer):
    """A base that is served."""

    name: str
    fingerprint: str


class HeldAdapter(Answer):
    """An adapter in memory, or used since the start; `bytes` of memory."""

    digest: str
    name: str | None
    state: str
    in_slot: bool
    is_held: bool
    is_pinned: bool
    bytes: int
    requests_now: int
    requests: int
    last_used: str | None
    names: list[str]


class Engine(Answer):
    """An engine's numbers, as /health has them: memory in bytes, counts since the start."""

    model_config = ConfigDict(extra="allow")

    kv_usage: float
    kv_bytes: int
    running: int
    waiting: int
    slots_used: int
    slots_total: int
    adapters_loaded: int
    adapter_bytes: int
    adapter_loads: int
    adapter_evictions: int


class ServedBase(Answer):
    """One of several bases that are served, and what its engine does."""

    base: Served
    engine: Engine


class Use(Answer):
    """How much one key has asked one adapter since the start."""

    key: str
    adapter: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


class ServerAnswer(Answer):
    """What the server does now; base and engine are null where there is no model."""

    base: Served | None
    engine: Engine | None
    adapters: list[HeldAdapter]
    usage: list[Use] = Field([])
    bases: list[ServedBase] = Field([], description="Where several are served")
    remote: dict[str, Any] = Field({}, description="The remote that is followed, how far, and what is wrong with it")
