"""The endpoints that change something: aliases, tags, evaluations, votes; and those that start or stop something."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request

from adapterhub_local.errors import InputError
from adapterhub_local.keys import Key
from adapterhub_local.refs import check_alias, check_name
from adapterhub_local.registry.lineage_form import check_lineage
from adapterhub_local.registry.marks import add_tags, describe, remove_alias, remove_tags, rollback, tags_of
from adapterhub_local.registry.protecting import approve, protect, scores_without_values, unprotect
from adapterhub_local.registry.split import set_split
from adapterhub_local.train.past_runs import ask_to_stop
from serve.access import Scope, access
from serve.auth import check_models
from serve.errors import BadParameter
from serve.registry_api.answers import SplitAnswer, answers
from serve.registry_api.bodies import (
    AliasBody,
    ApprovalBody,
    CompareBody,
    DescriptionBody,
    EvaluationBody,
    MergeBody,
    ProtectionBody,
    RollbackBody,
    SplitBody,
    TagsBody,
    VoteBody,
)
from serve.registry_api.changed_answers import (
    AliasAnswer,
    ApprovalAnswer,
    DescriptionAnswer,
    EvaluationAnswer,
    ProtectionAnswer,
    TagAnswer,
    VoteAnswer,
)
from serve.registry_api.course_answers import JobAnswer, StoppedRun
from serve.registry_api.library import Library
from serve.registry_api.merging import start_merge
from serve.registry_api.reading import key_of
from serve.registry_api.votes import vote


def move_alias(library: Library, key: Key | None, name: str, body: AliasBody) -> dict[str, Any]:
    """Point an alias; what all aliases of the name are then. Raises Forbidden, NotFound, InUse."""
    check_models(key, [name])
    check_name(name)
    library.registry.set_alias(name, body.alias, body.version, expect=body.expected)
    return {"name": name, "aliases": library.registry.aliases(name)}


def change_tags(library: Library, key: Key | None, reference: str, add: Sequence[str], remove: Sequence[str]) -> Any:
    """Give and take tags; what tags the version has then. Raises BadReference, Forbidden, NotFound."""
    version = library.resolve(key, reference)
    if remove:
        remove_tags(library.registry, version, tuple(remove))
    if add:
        add_tags(library.registry, version, tuple(add))
    return {"reference": str(version), "tags": tags_of(library.registry, version)}


def add_changing(app: FastAPI, library: Library) -> None:
    """Add the endpoints."""

    @app.put("/v1/registry/aliases/{name:path}", responses=answers(AliasAnswer))
    @access(Scope.ADMIN)
    def set_alias(name: str, body: AliasBody, request: Request) -> dict[str, Any]:
        """Point an alias of an adapter to a version; 409 with where it points now if that is not what is expected."""
        return move_alias(library, key_of(request), name, body)

    @app.post("/v1/registry/aliases/{name:path}", responses=answers(AliasAnswer))
    @access(Scope.ADMIN)
    def roll_back(name: str, body: RollbackBody, request: Request) -> dict[str, Any]:
        """Point an alias to where it pointed before."""
        check_models(key_of(request), [name])
        rollback(library.registry, check_name(name), body.alias, expect=body.expect, to=body.to)
        return {"name": name, "aliases": library.registry.aliases(name)}

    @app.delete("/v1/registry/aliases/{name:path}", responses=answers(AliasAnswer))
    @access(Scope.ADMIN)
    def drop_alias(
        name: str, alias: str, request: Request, expect: Annotated[int | None, Query(ge=1)] = None
    ) -> dict[str, Any]:
        """Remove an alias; its log stays."""
        check_models(key_of(request), [name])
        remove_alias(library.registry, check_name(name), check_alias(alias), expect=expect)
        return {"name": name, "aliases": library.registry.aliases(name)}

    @app.post("/v1/registry/approvals", responses=answers(ApprovalAnswer))
    @access(Scope.ADMIN)
    def approvals(body: ApprovalBody, request: Request) -> dict[str, Any]:
        """Hold a version fit for an alias, as this key; whoever moves the alias needs another's approval."""
        version = library.resolve(key_of(request), body.reference)
        given = approve(library.registry, version, body.alias, is_given=not body.withdraw)
        return {"reference": str(version), "alias": body.alias, "approvals": [vars(one) for one in given]}

    @app.put("/v1/registry/protections/{name:path}", responses=answers(ProtectionAnswer))
    @access(Scope.ADMIN)
    def set_protection(name: str, body: ProtectionBody, request: Request) -> dict[str, Any]:
        """Protect an alias, in place of any earlier protection."""
        check_models(key_of(request), [name])
        made = protect(library.registry, name, body.alias, body.require, body.approvals)
        without = scores_without_values(library.registry, made)
        return {"name": name, "protection": made.to_json(), "scores_without_values": without}

    @app.delete("/v1/registry/protections/{name:path}", responses=answers(ProtectionAnswer))
    @access(Scope.ADMIN)
    def lift_protection(name: str, alias: str, request: Request) -> dict[str, Any]:
        """Let an alias move anywhere again; the history keeps who lifted the protection."""
        check_models(key_of(request), [name])
        unprotect(library.registry, check_name(name), check_alias(alias))
        return {"name": name, "protection": None}

    @app.put("/v1/registry/splits/{name:path}", responses=answers(SplitAnswer))
    @access(Scope.ADMIN)
    def set_sides(name: str, body: SplitBody, request: Request) -> dict[str, Any]:
        """Split the traffic of a name between aliases; 409 if it is not split as is expected."""
        check_models(key_of(request), [name])
        expected = None if body.expect is None else [(side.alias, side.share) for side in body.expect]
        set_split(library.registry, name, [(side.alias, side.share) for side in body.split], expect=expected)
        return {"name": name, "split": [side.model_dump() for side in body.split]}

    @app.put("/v1/registry/descriptions/{reference:path}", responses=answers(DescriptionAnswer))
    @access(Scope.ADMIN)
    def description(reference: str, body: DescriptionBody, request: Request) -> dict[str, Any]:
        """Describe a version in one line, in place of an earlier description."""
        version = library.resolve(key_of(request), reference)
        describe(library.registry, version, body.text, expect=body.expect)
        return {"reference": str(version), "description": body.text}

    @app.put("/v1/registry/tags/{reference:path}", responses=answers(TagAnswer))
    @access(Scope.ADMIN)
    def tags(reference: str, body: TagsBody, request: Request) -> Any:
        """Give tags to a version, and take tags off it."""
        return change_tags(library, key_of(request), reference, body.add, body.remove)

    @app.post("/v1/registry/evaluations/{reference:path}", responses=answers(EvaluationAnswer))
    @access(Scope.ADMIN)
    def evaluation(reference: str, body: EvaluationBody, request: Request) -> dict[str, Any]:
        """Keep scores of a version beside it, as `qhub eval` does."""
        version = library.resolve(key_of(request), reference)
        if not isinstance(body.scores.get("adapter"), dict):
            raise BadParameter("scores must have the adapter's own: {'adapter': {'accuracy': 0.9}}", "scores")
        try:
            check_lineage({"metrics": {body.task: body.scores}})
        except ValueError as error:
            raise BadParameter(str(error).replace("its lineage has", "these scores have"), "scores") from None
        library.registry.add_evaluation(version, body.task, body.scores)
        return {"reference": str(version), "metrics": library.registry.metrics(version)}

    @app.post("/v1/registry/votes", responses=answers(VoteAnswer))
    @access(Scope.ADMIN)
    def votes(body: VoteBody, request: Request) -> dict[str, Any]:
        """Keep which of two answers a person preferred as an evaluation of the versions that gave them."""
        names = [name for text in (body.left, body.right) for name in library.names_in(text)]
        check_models(key_of(request), names)
        return vote(library.registry, body)

    @app.post("/v1/registry/compare/modules", status_code=202, responses=answers(JobAnswer, 202))
    @access(Scope.ADMIN)
    def compare_modules(body: CompareBody, request: Request) -> dict[str, Any]:
        """Measure norms and cosines of every module of two versions: a job."""
        return library.compare_modules(key_of(request), body.left, body.right).to_json()

    @app.post("/v1/merges", status_code=202, responses=answers(JobAnswer, 202))
    @access(Scope.ADMIN)
    def merge(body: MergeBody, request: Request) -> dict[str, Any]:
        """Merge adapters, or compute what that would lose: a job."""
        return start_merge(library, key_of(request), body).to_json()

    @app.post("/v1/jobs/{job}/cancel", responses=answers(JobAnswer))
    @access(Scope.ADMIN)
    def cancel(job: str, request: Request) -> dict[str, Any]:
        """Ask a job to end; a run stops after its step and is kept, and stops at once when it is asked again."""
        return library.jobs.cancel(library.job(key_of(request), job).id).to_json()

    @app.post("/v1/runs/{run}/stop", responses=answers(StoppedRun))
    @access(Scope.ADMIN)
    def stop(run: str, request: Request) -> dict[str, Any]:
        """Ask a run to stop after its step; its state is kept, and it can be resumed."""
        found = library.run(key_of(request), run)
        if found.status != "running":
            raise InputError(f"{found.id} is not running, it is {found.status}: there is nothing to stop")
        ask_to_stop(found)
        return {**library.run_entry(found), "stop_asked": True}
