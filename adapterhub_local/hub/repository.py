"""One repository on the Hub as `push` sees it: its refs, its blobs, its card, a tag, a branch.

Every function can be stopped at any call and run again: what is there already is recognised, never doubled.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HTTPError
from huggingface_hub.hf_api import RepoFile

from adapterhub_local.durable import CHUNK
from adapterhub_local.errors import InputError, InUse
from adapterhub_local.hub.client import status_of
from adapterhub_local.hub.package import CARD, MANIFEST, Package, describes
from adapterhub_local.hub.patience import PatientApi
from adapterhub_local.registry import File

MAX_CARD = 1 << 20  # bytes


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
    blobs = blobs_at(target, commit, package)
    if MANIFEST not in blobs or any(blobs.get(file.path) not in _oids(package, file) for file in package.listed):
        return False
    return describes(read_manifest(target, commit), package)


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


def read_manifest(target: Target, oid: str) -> bytes:
    """qhub's manifest at a commit, where there is one."""
    path = target.api.hf_hub_download(target.repo_id, MANIFEST, revision=oid, local_dir=target.tmp / oid)
    return Path(path).read_bytes()


def blobs_at(target: Target, oid: str, package: Package) -> dict[str, str]:
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
