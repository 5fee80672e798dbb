"""The answers of the registry, runs and jobs, as /openapi.json describes them.

They describe, and nothing is made of them: an endpoint answers what the library gives, whose bytes no model touches.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Metrics = Annotated[
    dict[str, dict[str, Any]], Field(description="By task: the scores of the adapter, and of its base beside them")
]
Aliases = Annotated[dict[str, int], Field(description="By alias: the number of the version that it points to")]
STATUSES = (
    "400: it cannot be read, or asks for what cannot be. 401: it needs an API key. 403: the key is not for this. "
    "404: there is no such thing. 409: it is otherwise than was expected. 429: too much at once"
)


class Answer(BaseModel):
    """A form that is published, and that nothing is read or written by."""


def answers(model: type[Answer], status: int = 200) -> dict[int | str, dict[str, Any]]:
    """What a route says of its answers, for `responses`."""
    return {status: {"model": model}, "4XX": {"model": Problem, "description": STATUSES}}


class ProblemDetail(Answer):
    """What is wrong with a request, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class Problem(Answer):
    """Why a request was refused."""

    error: ProblemDetail


class BaseName(Answer):
    """The base that a version was made for, as far as it is known."""

    name: str | None
    hub_id: str | None
    fingerprint: str | None


class AdapterEntry(Answer):
    """A version as a list shows it; `size` in bytes."""

    reference: str
    name: str
    version: int
    num_versions: int
    created_at: str
    content_digest: str
    base: BaseName
    rank: int | None
    alpha: float | None
    kind: str | None
    task: str | None
    method: str | None = Field(description="Of a merge")
    description: str | None
    size: int
    tags: list[str]
    aliases: Aliases
    metrics: Metrics


class AdapterList(Answer):
    """A page of versions; `after` leads to the next one, null on the last."""

    object: Literal["list"]
    data: list[AdapterEntry]
    total: int
    after: str | None


class Side(Answer):
    """An alias and its share of a name's traffic."""

    alias: str
    share: int


class Protection(Answer):
    """What an alias asks before it moves."""

    alias: str
    require: list[str]
    approvals: int
    actor: str | None
    at: str


class ApprovalEntry(Answer):
    """Who holds a version fit for an alias; null for who may not see it."""

    reference: str
    alias: str
    actor: str | None
    at: str


class AliasMove(Answer):
    """A move of an alias; a number is null where it points to nothing."""

    alias: str
    action: str
    old_number: int | None
    new_number: int | None
    changed_at: str
    actor: str | None


class Adapter(Answer):
    """One name: versions, newest first, of which there are `total`, and what points to them."""

    name: str
    versions: list[AdapterEntry]
    total: int
    aliases: Aliases
    split: list[Side]
    protections: list[Protection]
    approvals: list[ApprovalEntry]
    alias_log: list[AliasMove]


class VersionFile(Answer):
    """A file of a version; `size` in bytes."""

    path: str
    digest: str
    size: int


class VersionAnswer(Answer):
    """One version with all that it was made of."""

    name: str
    version: int
    reference: str
    content_digest: str
    manifest_digest: str
    created_at: str
    files: list[VersionFile]
    lineage: dict[str, Any]
    aliases: list[str]
    tags: list[str]
    description: str | None
    metrics: Metrics


class LineageNode(Answer):
    """A version, or a file of data; `reference` is null for what is not a version here."""

    id: str
    label: str
    detail: str
    reference: str | None
    depth: int


class LineageEdge(Answer):
    """What went into what."""

    source: str = Field(alias="from")
    to: str
    weight: Any


class LineageGraph(Answer):
    """What a version was made of, and what was made of it; `is_cut`: there is more than was walked."""

    nodes: list[LineageNode]
    edges: list[LineageEdge]
    made_into: list[str]
    is_cut: bool


class Comparison(Answer):
    """What differs between two versions: by its name in the lineage, what the left and the right one have."""

    left: str
    right: str
    same_content: bool
    lineage: dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]]


class BaseEntry(Answer):
    """A base; of one that is not here only the first five fields are known."""

    name: str | None
    hub_id: str | None
    fingerprint: str | None
    num_versions: int
    is_here: bool
    architecture: str = ""
    num_parameters: int = 0
    num_quantised: int = 0
    bits_per_weight: float = 0
    bits_per_parameter: float = 0
    size: int = Field(0, description="In bytes")
    max_length: int | None = None
    has_chat_template: bool = False
    revision: str | None = None
    created_at: str = ""
    is_private: bool = False
    licence: str | None = None
    left_out: list[str] = Field([])
    not_read_back: str | None = None
    chat_template: str | None = None
    quantisation: str = ""


class BaseList(Answer):
    """All bases."""

    object: Literal["list"]
    data: list[BaseEntry]


class Change(Answer):
    """Something that changed, with further fields by its `event`; `id` is null for what an older qhub wrote."""

    model_config = ConfigDict(extra="allow")

    id: int | None
    at: str
    actor: str | None
    event: str
    reference: str | None = None
    what: str


class ChangeList(Answer):
    """A page of changes, newest first; `after` leads to the next one, null on the last."""

    object: Literal["list"]
    data: list[Change]
    after: str | None


class SplitAnswer(Answer):
    """A name whose traffic is split, and how."""

    name: str
    split: list[Side]


class SplitList(Answer):
    """Every name whose traffic is split."""

    object: Literal["list"]
    data: list[SplitAnswer]
