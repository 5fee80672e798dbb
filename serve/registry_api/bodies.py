"""The bodies of requests that change something in the registry, or start something."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from adapterhub_local.registry.split import MAX_SHARE

Name = Annotated[str, Field(min_length=1, max_length=300)]
Setting = Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")]
Whole = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Number = Annotated[float, Field(strict=True)]
Weight = Annotated[float, Field(allow_inf_nan=False)]
MAX_DESCRIPTION = 2000
MAX_MERGED = 16  # adapters of one merge


class Body(BaseModel):
    """A body with no more in it than is read."""

    model_config = ConfigDict(extra="forbid")


class AliasBody(Body):
    """Point an alias to a version; with `expect`, only if it points to that version now (null: to nothing yet)."""

    alias: Name
    version: Annotated[int, Field(ge=1)]
    expect: Annotated[int, Field(ge=1)] | None = None

    @property
    def expected(self) -> int | None:
        """As the registry reads it: 0 for nothing, None where nothing is expected."""
        return (self.expect or 0) if "expect" in self.model_fields_set else None


class RollbackBody(Body):
    """Point an alias to where it pointed before; with `expect`, only from that version, with `to`, only to that one."""

    alias: Name
    expect: Annotated[int, Field(ge=1)] | None = None
    to: Annotated[int, Field(ge=1)] | None = None


class ApprovalBody(Body):
    """Hold a version fit for an alias, or take that back."""

    reference: Name
    alias: Name
    withdraw: bool = False


class ProtectionBody(Body):
    """Let an alias move only to versions that meet all of `require` and have this many approvals from others."""

    alias: Name
    require: Annotated[list[Name], Field(max_length=100, fail_fast=True)] = []
    approvals: Annotated[int, Field(ge=0)] = 0


class SideBody(Body):
    """An alias and its share of a name's traffic."""

    alias: Name
    share: Annotated[int, Field(ge=1, le=MAX_SHARE)]


class SplitBody(Body):
    """Split a name's traffic between aliases, none for no split; with `expect`, only if it is split so now."""

    split: Annotated[list[SideBody], Field(max_length=100, fail_fast=True)]
    expect: Annotated[list[SideBody], Field(max_length=100, fail_fast=True)] | None = None


class DescriptionBody(Body):
    """One line about a version; with `expect`, only if that is its description now (empty: it has none)."""

    text: Annotated[str, Field(min_length=1, max_length=MAX_DESCRIPTION)]
    expect: str | None = None


class TagsBody(Body):
    """Tags to give to a version, and tags to take off it."""

    add: Annotated[list[Name], Field(fail_fast=True)] = []
    remove: Annotated[list[Name], Field(fail_fast=True)] = []


class EvaluationBody(Body):
    """Scores of a version on a task, in the form of a lineage's metrics: who -> metric -> number."""

    task: Name
    scores: dict[str, Any]


class CompareBody(Body):
    """Two versions whose modules are to be measured against each other."""

    left: Name
    right: Name


class MergeBody(Body):
    """A merge: the weighted sum, or another method, of adapters. Without a name only what it would lose is computed.

    `parameters` are those of the method, such as `{"density": 0.2}`. Of `rank`, `energy` and `max_error`, which say how
    much is kept, one may be given.
    """

    adapters: Annotated[list[Name], Field(min_length=1, max_length=MAX_MERGED, fail_fast=True)]
    weights: Annotated[list[Weight], Field(min_length=1, max_length=MAX_MERGED, fail_fast=True)]
    method: Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")] = "weighted_sum"
    parameters: Annotated[dict[Setting, Whole | Number | Setting], Field(max_length=16)] = {}
    rank: Annotated[int, Field(ge=1, le=100_000)] | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    max_error: Annotated[float, Field(ge=0, lt=1)] | None = None
    name: Name | None = None
    alias: Name | None = None


class VoteBody(Body):
    """What a person preferred who did not know which was which; `id` is new for every vote."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8,64}$")]
    left: Name
    right: Name
    winner: Literal["left", "right", "tie"]
    set: Annotated[str, Field(pattern=r"^[a-z0-9._-]{1,64}$")] = "playground"
    prompt: Annotated[str, Field(max_length=100_000)] = ""
