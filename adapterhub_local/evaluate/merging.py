"""A written merge carried out: its adapters found, merged, scored where that is asked for, and put where they go."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub_local.evaluate.gate import Requirement, judge
from adapterhub_local.hub.adapters import opening
from adapterhub_local.merge.plan_file import WrittenPlan
from adapterhub_local.merge.tuning import Scored
from adapterhub_local.progress import Quiet, Reporter
from adapterhub_local.registry import Registry, Version

if TYPE_CHECKING:
    from adapterhub_local.merge.merge import Judge
    from adapterhub_local.merge.plan import MergePlan
    from adapterhub_local.merge.report import MergeReport


@dataclass(frozen=True)
class Merged:
    """What a merge has made: its report, and the version or the path it is at; neither after a dry run.

    `by_rank` is the error at rank 1, 2 and so on, where a dry run was asked for it.
    """

    report: "MergeReport"
    version: Version | None = None
    path: str | None = None
    by_rank: list[float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Where it is, as `--json` shows it."""
        if self.version is not None:
            return {"reference": str(self.version), "content_digest": self.version.content_digest}
        return {"output": self.path, **({"error_by_rank": self.by_rank} if self.by_rank is not None else {})}


def carry_out(
    written: WrittenPlan,
    registry: Registry,
    *,
    dry_run: bool = False,
    by_rank: bool = False,
    reporter: Reporter | None = None,
    note: Callable[[str], None] | None = None,
) -> Merged:
    """Do the merge that is written; with `dry_run` only its report is computed, in full, and the error `by_rank`.

    Adapters that are on the Hub only are pulled first and named to `note`. What [evaluate] requires is scored before
    anything is kept. Raises what opening, merging, scoring and publishing raise; nothing is then half-written.
    """
    from adapterhub_local.merge.by_rank import errors_by_rank
    from adapterhub_local.merge.merge import dry_run as merge_dry

    scored = written.evaluate or Scored({})
    requirements = [Requirement.parse(text) for text in scored.require]
    with opening(written, registry, fetch=not dry_run, note=note) as opened:
        plan = opened(written.weights)
        if dry_run:
            return Merged(merge_dry(plan), by_rank=errors_by_rank(plan) if by_rank else None)
        check = None
        if scored.data or requirements:
            check = judge(plan.base, scored, requirements, registry.home, reporter or Quiet())
        return put(plan, written, registry, check, required(written))


def put(
    plan: "MergePlan", written: WrittenPlan, registry: Registry, check: "Judge | None", lineage: Mapping[str, Any]
) -> Merged:
    """Merge, and write or register the result where `written` says; `lineage` is added to that of a version."""
    from adapterhub_local.merge.merge import merge_to_path, merge_to_registry

    if written.path is not None:
        return Merged(merge_to_path(plan, written.path, judge=check), path=str(written.path))
    assert written.name is not None, "there is a name or a path"
    version, report = merge_to_registry(plan, registry, written.name, alias=written.alias, judge=check, note=lineage)
    return Merged(report, version)


def required(written: WrittenPlan) -> dict[str, Any]:
    """What the lineage of a merge says of the requirements that it met."""
    texts = written.evaluate.require if written.evaluate is not None else ()
    return {"required": [str(Requirement.parse(text)) for text in texts]} if texts else {}
