"""`push`: a version becomes one commit and one tag of a repository on the Hub.

What is in the commit is `package`'s business. A push that failed half-way is finished by pushing again:
the manifest in the repository says whether the commit is there already.
"""

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.hf_api import RepoFile

from adapterhub_local.durable import CHUNK, staging
from adapterhub_local.errors import HubError, InputError, InUse
from adapterhub_local.hub.client import check_repo_id, connect, hub_errors, is_model_id, status_of
from adapterhub_local.hub.package import MANIFEST, Package, describes, pack
from adapterhub_local.registry import File, Registry, Version

ATTEMPTS = 3  # at a commit, while others commit at the same time
_VERSION_TAG = re.compile(r"v\d+")


@dataclass(frozen=True)
class PushResult:
    """Where a version is on the Hub; `unchanged` if its commit was there already."""

    repo_id: str
    commit: str
    tag: str
    url: str
    unchanged: bool


@dataclass(frozen=True)
class _Target:
    """The repository, and a folder for what is read back from it."""

    api: HfApi
    repo_id: str
    tmp: Path


def push(
    registry: Registry,
    reference: str,
    repo_id: str,
    *,
    base_id: str | None = None,
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> PushResult:
    """Publish the version as one commit on `main` of `repo_id` ("ORG/REPO") and the tag `v<number>`.

    The repository is made if it is missing; the version is not sent again if it is there. `base_id` is the
    Hub id of the base, where the version does not know it. Raises InputError for a request that cannot be
    met, InUse if the tag is another version or others change the same files meanwhile, Corrupt if the
    version's bytes are damaged, HubError for the rest.
    """
    version = registry.resolve(reference)
    check_repo_id(repo_id)
    base_id = _base_id(version, base_id)
    package = pack(version, registry.folder(version), base_id, repo_id, registry.home.root)
    api = connect(endpoint, token, to_write=True)
    tag = f"v{version.number}"
    with hub_errors(repo_id, endpoint=api.endpoint), staging(registry.home.tmp) as folder:
        target = _Target(api, repo_id, folder)
        is_new = _make_repository(target, private)
        head, tags = _refs(target)
        if tag in tags:
            if not _is_there(target, tags[tag], package):
                raise InUse(
                    f"{repo_id} has a tag {tag} that is not {version}: push to another repository, or delete the tag "
                    f"on {api.endpoint}/{repo_id}/refs"
                )
            commit, unchanged = tags[tag], True
        else:
            # no need to look into a head that is new or carries the tag of another version
            is_other = is_new or any(_VERSION_TAG.fullmatch(name) for name, tagged in tags.items() if tagged == head)
            unchanged = head is not None and not is_other and _is_there(target, head, package)
            commit = head if unchanged and head else _commit(target, head, package, f"Add {version}")
            _make_tag(target, tag, commit)
    return PushResult(repo_id, commit, tag, f"{api.endpoint}/{repo_id}/tree/{tag}", unchanged)


def _base_id(version: Version, given: str | None) -> str:
    """The Hub id of the version's base. Raises InputError if nobody knows it."""
    base_id = given or version.lineage.get("base", {}).get("hub_id")
    if not base_id:
        raise InputError(
            f"{version} was made on a base that is not known on the Hub, and a model card must name it: "
            "give --base-id ORG/MODEL, the model the base was made from"
        )
    if not is_model_id(base_id):
        raise InputError(f"{base_id!r} is not the id of a model on the Hub: give --base-id ORG/MODEL")
    return base_id


def _make_repository(target: _Target, private: bool) -> bool:
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


def _refs(target: _Target) -> tuple[str | None, dict[str, str]]:
    """The commit at the head of `main`, None if there is none, and tag -> commit."""
    refs = target.api.list_repo_refs(target.repo_id)
    heads = {branch.name: branch.target_commit for branch in refs.branches}
    return heads.get("main"), {tag.name: tag.target_commit for tag in refs.tags}


def _is_there(target: _Target, commit: str, package: Package) -> bool:
    """Whether weights and config at `commit` are those of `package`, and the manifest names its version."""
    blobs = _blobs(target, commit, package)
    if MANIFEST not in blobs or any(blobs.get(file.path) not in _oids(package, file) for file in package.listed):
        return False
    path = target.api.hf_hub_download(target.repo_id, MANIFEST, revision=commit, local_dir=target.tmp / commit)
    return describes(Path(path).read_bytes(), package)


def _blobs(target: _Target, commit: str, package: Package) -> dict[str, str]:
    """The oids of our files at `commit`: path -> sha256 of a large file, git's sha1 of another."""
    found = target.api.get_paths_info(target.repo_id, list(package.files), revision=commit)
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


def _commit(target: _Target, head: str | None, package: Package, message: str) -> str:
    """Commit the package on top of `head`; the new commit.

    If others commit at the same time, it is tried again on theirs, unless they changed our files. If the
    Hub's answer was lost, the commit is recognised by its manifest.
    """
    for _ in range(ATTEMPTS):
        try:
            with _operations(package) as operations:
                return target.api.create_commit(
                    target.repo_id, operations=operations, commit_message=message, parent_commit=head
                ).oid
        except HTTPError as error:
            status = status_of(error)
            if status is not None and status != 412 and status < 500:
                raise
            new_head, _ = _refs(target)
            if new_head is not None and new_head != head and _is_there(target, new_head, package):
                return new_head
            if status != 412 or new_head is None:
                raise
            if head is not None and _blobs(target, head, package) != _blobs(target, new_head, package):
                raise InUse(
                    f"someone else is changing the adapter in {target.repo_id}: look at it, then push again"
                ) from None
            head = new_head
    raise HubError(f"{target.repo_id} was changed by others {ATTEMPTS} times while this was pushed: push again")


def _make_tag(target: _Target, tag: str, commit: str) -> None:
    try:
        target.api.create_tag(target.repo_id, tag=tag, revision=commit)
    except HTTPError as error:
        if status_of(error) != 409:
            raise
        if _refs(target)[1].get(tag) != commit:
            raise InUse(
                f"someone else made the tag {tag} of {target.repo_id} meanwhile: push to another repository"
            ) from None
