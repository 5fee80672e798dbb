"""Commits of a version to its repository on the Hub: on main, beside it, or as a pull request.

Each can be stopped at any call and run again: what is there already is recognised, never doubled.
"""

import io
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HTTPError

from adapterhub_local.errors import HubError, InUse
from adapterhub_local.hub.client import status_of
from adapterhub_local.hub.package import MANIFEST, OPTIONAL, Package
from adapterhub_local.hub.patience import PAUSES
from adapterhub_local.hub.repository import Refs, Target, blobs_at, is_there, read_manifest, read_refs
from adapterhub_local.lora.config import WEIGHTS

ATTEMPTS = 8  # at a commit, while others commit at the same time


def commit_beside(target: Target, refs: Refs, package: Package, message: str, branch: str) -> str:
    """Commit the package on a branch of its own, from where main is, so that main stays there; the new commit."""
    at = refs.branches.get(branch)
    if at is None:
        at = refs.head
        assert at is not None, "a repository with a newer version has a main branch"
        target.api.create_branch(target.repo_id, branch=branch, revision=at)
    elif is_there(target, at, package):
        return at
    return _create(target, at, package, message, _left_over(target, at, package), branch=branch).oid


def commit(target: Target, head: str | None, package: Package, message: str, *, is_new: bool = False) -> str:
    """Commit the package on top of `head`; the new commit.

    Others who commit at the same time are built upon: what they changed stays, and a whole version that they
    pushed keeps its commit and its tag. If the Hub's answer was lost, the commit is recognised by its manifest.
    Raises InUse if they changed our files by hand. What an earlier version left and this one has not is removed;
    `is_new` says that there is no earlier one.
    """
    pauses = list(PAUSES)
    for _ in range(ATTEMPTS):
        stale = [] if is_new or head is None else _left_over(target, head, package)
        try:
            return _create(target, head, package, message, stale).oid
        except HTTPError as error:
            status = status_of(error)
            if status is not None and status != 412 and status < 500:
                raise
            new_head = read_refs(target).head
            if new_head is not None and new_head != head and is_there(target, new_head, package):
                return new_head
            if status is not None and status >= 500 and new_head == head and pauses:
                time.sleep(pauses.pop(0))
                continue
            if status != 412 or new_head is None:
                raise
            if head is not None and not _may_follow(target, head, new_head, package):
                raise InUse(
                    f"someone else is changing the adapter in {target.repo_id}: look at it, then push again"
                ) from None
            head, is_new = new_head, False
    raise HubError(f"{target.repo_id} was changed by others {ATTEMPTS} times while this was pushed: push again")


def propose(target: Target, head: str | None, package: Package, message: str) -> tuple[str, str]:
    """Commit the package to a new pull request; its commit and number."""
    try:
        stale = [] if head is None else _left_over(target, head, package)
        info = _create(target, head, package, message, stale, create_pr=True)
        assert info.pr_revision is not None, "the Hub names the pull request it made"
        return info.oid, info.pr_revision.removeprefix("refs/pr/")
    except HTTPError as error:
        status = status_of(error)
        found = find_proposal(target, package) if status is None or status >= 500 else None  # the answer was lost
        if found is None:
            raise
        return found


def find_proposal(target: Target, package: Package, *, newest: int = 10) -> tuple[str, str] | None:
    """Commit and number of a pull request that holds this very version, among the `newest` ones."""
    requests = list(read_refs(target, pull_requests=True).pull_requests.items())[:newest]
    return next(((oid, number) for number, oid in requests if is_there(target, oid, package)), None)


def _create(
    target: Target,
    head: str | None,
    package: Package,
    message: str,
    stale: list[str],
    *,
    create_pr: bool = False,
    branch: str | None = None,
) -> CommitInfo:
    with _operations(package) as additions:
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions]
        operations += [CommitOperationDelete(path) for path in stale]
        return target.api.create_commit(
            target.repo_id,
            operations=operations,
            commit_message=message,
            parent_commit=head,
            create_pr=create_pr,
            revision=branch,
        )


def _left_over(target: Target, oid: str, package: Package) -> list[str]:
    """The files at a commit that only some versions have, and this one has not."""
    absent = [path for path in OPTIONAL if path not in package.files]
    found = target.api.get_paths_info(target.repo_id, absent, revision=oid) if absent else []
    return [entry.path for entry in found]


def _may_follow(target: Target, head: str, new_head: str, package: Package) -> bool:
    """Whether a commit on `new_head` loses nothing: our files are as they were at `head`, or a whole version."""
    before, now = blobs_at(target, head, package), blobs_at(target, new_head, package)
    if before == now:
        return True
    if MANIFEST not in now or before.get(MANIFEST) == now[MANIFEST]:
        return False
    try:
        files = json.loads(read_manifest(target, new_head))["files"]
        pushed = {file["path"]: file["digest"].removeprefix("sha256:") for file in files}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return pushed.get(WEIGHTS) == now.get(WEIGHTS)


@contextmanager
def _operations(package: Package) -> Iterator[list[CommitOperationAdd]]:
    """One addition a file, from open files: those go by plain HTTP, where paths would go to xet and its own server."""
    with ExitStack() as stack:
        streams = {
            path: io.BytesIO(content) if isinstance(content, bytes) else stack.enter_context(open(content, "rb"))
            for path, content in package.files.items()
        }
        yield [CommitOperationAdd(path, stream) for path, stream in streams.items()]
