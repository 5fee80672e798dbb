"""One repository on the Hub as `push` sees it: its refs, its blobs, a commit, a tag, a branch.

Every function can be stopped at any call and run again: what is there already is recognised, never doubled.
"""

import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HTTPError
from huggingface_hub.hf_api import RepoFile

from adapterhub_local.durable import CHUNK
from adapterhub_local.errors import HubError, InputError, InUse
from adapterhub_local.hub.client import status_of
from adapterhub_local.hub.package import CARD, MANIFEST, OPTIONAL, Package, describes
from adapterhub_local.hub.patience import PAUSES, PatientApi
from adapterhub_local.lora.config import WEIGHTS
from adapterhub_local.registry import File

MAX_CARD = 1 << 20  # bytes
ATTEMPTS = 8  # at a commit, while others commit at the same time


@dataclass(frozen=True)
class Target:
    """The repository, and a folder for what is read back from it."""

    api: PatientApi
    repo_id: str
    tmp: Path


@dataclass(frozen=True)
class Refs:
    """Where branches, tags and pull requests (newest first; only if asked for) point: name -> commit."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]
    pull_requests: Mapping[str, str]

    @property
    def head(self) -> str | None:
        return self.branches.get("main")


def make_repository(target: Target, private: bool) -> bool:
    """Create the repository; False if it is there. Raises InUse if it should be private and is public."""
    try:
        target.api.create_repo(target.repo_id, private=True if private else None)
    except HTTPError as error:
        # 403: this token may not create in the organisation, but perhaps write to what is there
        if status_of(error) != 409 and not (status_of(error) == 403 and target.api.repo_exists(target.repo_id)):
            raise
        if private and not target.api.model_info(target.repo_id).private:
            raise InUse(
                f"{target.repo_id} exists and is public: make it private on its page, or push without --private"
            ) from None
        return False
    return True


def read_refs(target: Target, *, pull_requests: bool = False) -> Refs:
    """The refs of the repository, in one call."""
    refs = target.api.list_repo_refs(target.repo_id, include_pull_requests=pull_requests)
    requests = {ref.ref.removeprefix("refs/pr/"): ref.target_commit for ref in refs.pull_requests or ()}
    return Refs(
        {branch.name: branch.target_commit for branch in refs.branches},
        {tag.name: tag.target_commit for tag in refs.tags},
        dict(sorted(requests.items(), key=lambda item: int(item[0]) if item[0].isdigit() else 0, reverse=True)),
    )


def is_there(target: Target, commit: str, package: Package) -> bool:
    """Whether weights and config at `commit` are those of `package`, and the manifest names its version."""
    blobs = _blobs(target, commit, package)
    if MANIFEST not in blobs or any(blobs.get(file.path) not in _oids(package, file) for file in package.listed):
        return False
    return describes(_read_manifest(target, commit), package)


def remove_repository(target: Target) -> bool:
    """Remove the repository, which this push has made and left empty; False if this token may not."""
    try:
        target.api.delete_repo(target.repo_id)
    except HTTPError:
        return False
    return True


def read_card(target: Target, oid: str) -> str | None:
    """The model card at a commit. Raises InputError for one that is not text, or too long to be a card."""
    found = target.api.get_paths_info(target.repo_id, [CARD], revision=oid)
    if not found or not isinstance(found[0], RepoFile):
        return None
    if found[0].size > MAX_CARD:
        raise InputError(
            f"{CARD} of {target.repo_id} has {found[0].size:,} bytes: it is not a model card, move it away"
        )
    path = target.api.hf_hub_download(target.repo_id, CARD, revision=oid, local_dir=target.tmp / oid)
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{CARD} of {target.repo_id} is not UTF-8 text: fix it there") from None


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


def make_tag(target: Target, tag: str, oid: str) -> None:
    """Tag the commit. Raises InUse if the tag is another commit."""
    try:
        target.api.create_tag(target.repo_id, tag=tag, revision=oid)
    except HTTPError as error:
        status = status_of(error)
        if status is not None and status != 409 and status < 500:
            raise
        there = read_refs(target).tags.get(tag)  # someone else was first, or the answer was lost
        if there is None:
            raise
        if there != oid:
            raise InUse(
                f"someone else made the tag {tag} of {target.repo_id} meanwhile: push to another repository"
            ) from None


def move_branch(target: Target, branch: str, oid: str, refs: Refs) -> None:
    """Make `branch` point to a version's commit. The Hub moves no branch, so one that is there is created again.

    Raises InUse if it holds commits that are not a version, which would be lost.
    """
    there = refs.branches.get(branch)
    if there == oid:
        return
    if there is not None:
        if there not in refs.tags.values():
            raise InUse(
                f"the branch {branch} of {target.repo_id} holds commits that are not pushed versions: "
                "choose another alias, or remove the branch on the Hub"
            )
        target.api.delete_branch(target.repo_id, branch=branch)
    try:
        target.api.create_branch(target.repo_id, branch=branch, revision=oid)
    except HTTPError as error:
        if read_refs(target).branches.get(branch) == oid:  # the answer was lost, or another did the same
            return
        if status_of(error) == 409:
            raise InUse(f"someone else moved the branch {branch} of {target.repo_id} meanwhile: push again") from None
        raise


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
    before, now = _blobs(target, head, package), _blobs(target, new_head, package)
    if before == now:
        return True
    if MANIFEST not in now or before.get(MANIFEST) == now[MANIFEST]:
        return False
    try:
        files = json.loads(_read_manifest(target, new_head))["files"]
        pushed = {file["path"]: file["digest"].removeprefix("sha256:") for file in files}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return pushed.get(WEIGHTS) == now.get(WEIGHTS)


def _read_manifest(target: Target, oid: str) -> bytes:
    path = target.api.hf_hub_download(target.repo_id, MANIFEST, revision=oid, local_dir=target.tmp / oid)
    return Path(path).read_bytes()


def _blobs(target: Target, oid: str, package: Package) -> dict[str, str]:
    """The oids of our files at a commit: path -> sha256 of a large file, git's sha1 of another."""
    found = target.api.get_paths_info(target.repo_id, list(package.files), revision=oid)
    return {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in found if isinstance(entry, RepoFile)
    }


def _oids(package: Package, file: File) -> set[str]:
    """What the Hub may call this file: its sha256, or git's sha1 of a blob."""
    content = package.files[file.path]
    blob = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as stream:
        while chunk := stream.read(CHUNK):
            blob.update(chunk)
    return {file.digest.removeprefix("sha256:"), blob.hexdigest()}


@contextmanager
def _operations(package: Package) -> Iterator[list[CommitOperationAdd]]:
    """One addition a file, from open files: those go by plain HTTP, where paths would go to xet and its own server."""
    with ExitStack() as stack:
        streams = {
            path: io.BytesIO(content) if isinstance(content, bytes) else stack.enter_context(open(content, "rb"))
            for path, content in package.files.items()
        }
        yield [CommitOperationAdd(path, stream) for path, stream in streams.items()]
