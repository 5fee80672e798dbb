"""What endpoints that change something answer, as /openapi.json describes it: how it is afterwards."""

from typing import Any

from pydantic import Field

from serve.registry_api.answers import Aliases, Answer, Metrics, Protection


class AliasAnswer(Answer):
    """All aliases of a name."""

    name: str
    aliases: Aliases


class Approval(Answer):
    """Who holds a version fit for an alias."""

    alias: str
    manifest: str
    actor: str
    at: str


class ApprovalAnswer(Answer):
    """All approvals of a version for an alias."""

    reference: str
    alias: str
    approvals: list[Approval]


class ProtectionAnswer(Answer):
    """The protection of an alias, null for none, and the scores it asks that no version has yet."""

    name: str
    protection: Protection | None
    scores_without_values: list[str] = Field([])


class DescriptionAnswer(Answer):
    """The description of a version."""

    reference: str
    description: str


class TagAnswer(Answer):
    """All tags of a version."""

    reference: str
    tags: list[str]


class EvaluationAnswer(Answer):
    """All scores of a version."""

    reference: str
    metrics: Metrics


class VoteAnswer(Answer):
    """By version: its scores in the set of votes, which is a task."""

    task: str
    win_rates: dict[str, dict[str, Any]]
