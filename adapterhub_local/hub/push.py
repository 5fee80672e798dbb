"""`push`: a version becomes one commit and one tag of a repository on the Hub, or a pull request there.

What is in the commit is `package`'s business. A push that failed half-way is finished by pushing again:
the manifest in the repository says whether the commit is there already.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapterhub_local.durable import staging
from adapterhub_local.errors import BadReference, InputError, InUse
from adapterhub_local.hub.client import check_repo_id, connect, hub_errors, is_model_id
from adapterhub_local.hub.commits import commit, commit_beside, find_proposal, propose
from adapterhub_local.hub.edited import merged
from adapterhub_local.hub.licences import OTHER, check_licence
from adapterhub_local.hub.package import CARD, Package, pack
from adapterhub_local.hub.patience import Note
from adapterhub_local.hub.repository import (
    Target,
    is_there,
    make_repository,
    make_tag,
    move_branch,
    read_card,
    read_refs,
    remove_repository,
)
from adapterhub_local.hub.scores import with_base_scores
from adapterhub_local.refs import check_alias
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.kinds import is_router
from adapterhub_local.registry.signature import signature_of

_VERSION_TAG = re.compile(r"v\d{1,18}")


@dataclass(frozen=True)
class PushResult:
    """Where a version is on the Hub; `unchanged` if its commit was there already.

    A pull request has no tag, but a number; `branches` are those that point to the version now.
    """

    repo_id: str
    commit: str
    tag: str | None
    url: str
    unchanged: bool
    branches: tuple[str, ...] = ()
    pull_request: str | None = None


def push(
    registry: Registry,
    reference: str,
    repo_id: str,
    *,
    base_id: str | None = None,
    private: bool = False,
    aliases: Sequence[str] = (),
    pull_request: bool = False,
    licence: str | None = None,
    licence_name: str | None = None,
    licence_link: str | None = None,
    to_main: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    note: Note | None = None,
) -> PushResult:
    """Publish the version as one commit on `main` of `repo_id` ("ORG/REPO") and the tag `v<number>`.

    The repository is made if it is missing; the version is not sent again if it is there. Where a newer version is,
    `main` stays at it, unless `to_main`. Each of `aliases` becomes a branch at the version. With `pull_request` the
    commit is proposed to its owners instead. `base_id` is the Hub id of the base, where the version does not know it
    or its base is private; `licence` goes into the model card, `other` with its name and link. Of a card that people
    edited only our block and keys change. `note` gets a line about long waits.

    Raises InputError for a request that cannot be met, InUse if the tag is another version or others change the same
    files meanwhile, Corrupt if the version's bytes are damaged, HubError for the rest.
    """
    version = registry.resolve(reference)
    if is_router(version.lineage):
        raise InputError(
            f"{version} is a router, and the Hub has no repositories of that kind: share it by `qhub sync push` or "
            "`qhub export --oci`"
        )
    check_repo_id(repo_id)
    for alias in aliases:
        check_branch(alias)
    if pull_request and (private or aliases):
        raise InputError("a pull request goes to a repository that is there: leave --private and --alias out")
    terms = _licence(version, licence, licence_name, licence_link)
    package = pack(
        version, registry.folder(version), _base_id(version, base_id), repo_id, registry.home.root,
        metrics=with_base_scores(registry, version), licence=terms, signature=signature_of(registry, version),
    )  # fmt: skip
    api = connect(endpoint, token, to_write=True, note=note)
    with hub_errors(repo_id, endpoint=api.endpoint), staging(registry.home.scratch) as folder:
        target = Target(api, repo_id, folder)
        work = _propose if pull_request else _publish
        return work(
            target, version, package, private=private, aliases=tuple(aliases), to_main=to_main,
            is_licence_asked=licence is not None,
        )  # fmt: skip


def check_branch(alias: str) -> str:
    """`alias`, if it may name a branch of a repository. Raises BadReference; `main` is where versions go."""
    if check_alias(alias) == "main":
        raise BadReference("'main' is the branch that every version is committed to: choose another alias")
    return alias


def _publish(
    target: Target, version: Version, package: Package, *, private: bool, aliases: tuple[str, ...], to_main: bool,
    is_licence_asked: bool,
) -> PushResult:  # fmt: skip
    is_new = make_repository(target, private)
    refs = read_refs(target)
    tag, head, branch = f"v{version.number}", refs.head, f"qhub-v{version.number}"
    is_beside = False
    if tag in refs.tags:
        oid, unchanged = refs.tags[tag], True
        if not is_there(target, oid, package):
            raise InUse(
                f"{target.repo_id} has a tag {tag} that is not {version}: push to another repository, or delete the "
                f"tag on {target.api.endpoint}/{target.repo_id}/refs"
            )
    else:
        # no need to look into a head that is new or carries the tag of another version
        is_other = is_new or any(_VERSION_TAG.fullmatch(name) for name, tagged in refs.tags.items() if tagged == head)
        unchanged = head is not None and not is_other and is_there(target, head, package)
        if unchanged and head:
            oid = head
        else:
            if not is_new:
                package = _in_their_card(target, head, package, is_licence_asked)
            numbers = [int(name[1:]) for name in refs.tags if _VERSION_TAG.fullmatch(name)]
            is_beside = head is not None and not to_main and any(number > version.number for number in numbers)
            try:
                if is_beside:
                    oid = commit_beside(target, refs, package, f"Add {version}", branch)
                else:
                    oid = commit(target, head, package, f"Add {version}", is_new=is_new)
            except ValueError as error:
                raise _refused_card(target, version, error, is_new) from None
        make_tag(target, tag, oid)
    if is_beside or branch in refs.branches:  # the second is what a push left that was cut off
        target.api.delete_branch(target.repo_id, branch=branch)
    for alias in aliases:
        move_branch(target, alias, oid, refs)
    url = f"{target.api.endpoint}/{target.repo_id}/tree/{tag}"
    return PushResult(target.repo_id, oid, tag, url, unchanged, branches=aliases)


def _propose(target: Target, version: Version, package: Package, *, is_licence_asked: bool, **_: Any) -> PushResult:
    refs = read_refs(target)
    tag = f"v{version.number}"
    if tag in refs.tags and is_there(target, refs.tags[tag], package):
        url = f"{target.api.endpoint}/{target.repo_id}/tree/{tag}"
        return PushResult(target.repo_id, refs.tags[tag], tag, url, True)
    found = find_proposal(target, package)
    if found is None:
        package = _in_their_card(target, refs.head, package, is_licence_asked)
    try:
        oid, number = found or propose(target, refs.head, package, f"Add {version}")
    except ValueError as error:
        raise _refused_card(target, version, error, False) from None
    url = f"{target.api.endpoint}/{target.repo_id}/discussions/{number}"
    return PushResult(target.repo_id, oid, None, url, found is not None, pull_request=number)


def _in_their_card(target: Target, head: str | None, package: Package, is_licence_asked: bool) -> Package:
    """The package with its card in the one that is there, which people may have edited."""
    theirs = read_card(target, head) if head is not None else None
    ours = package.files[CARD]
    assert isinstance(ours, bytes), "a card is made here"
    if theirs is None:
        return package
    card = merged(theirs, ours.decode(), is_licence_asked=is_licence_asked, where=target.repo_id)
    return replace(package, files={**package.files, CARD: card.encode()})


def _refused_card(target: Target, version: Version, error: ValueError, is_new: bool) -> Exception:
    """What the Hub says is wrong with the model card; a repository that this push made for it does not stay empty."""
    if "Invalid metadata" not in str(error):
        return error
    left = f"; the repository was made and is empty, remove it on {target.api.endpoint}/{target.repo_id}/settings"
    left = "" if not is_new or remove_repository(target) else left
    reasons = " ".join(line.strip("- ") for line in str(error).splitlines()[1:]) or str(error)
    return InputError(f"the Hub rejects the model card of {version}: {reasons}{left}")


def _licence(version: Version, given: str | None, name: str | None, link: str | None) -> dict[str, str] | None:
    """The licence for the card. Raises InputError where that of the base is one of its own."""
    if given is not None:
        return check_licence(given, name, link)
    if name or link:
        raise InputError("--license-name and --license-link go with --license other")
    if (version.lineage.get("base") or {}).get("license") == OTHER:
        raise InputError(
            f"the licence of the base of {version} is one of its own, which a model card must name: "
            "--license other --license-name NAME --license-link URL"
        )
    return None


def _base_id(version: Version, given: str | None) -> str:
    """The Hub id of the version's base. Raises InputError if it is not known, or others could not load it."""
    base = version.lineage.get("base") or {}
    base_id = given or base.get("hub_id")
    if not base_id:
        raise InputError(
            f"{version} was made on a base that is not known on the Hub, and a model card must name it: "
            "give --base-id ORG/MODEL, the model the base was made from"
        )
    if not given and base.get("private"):
        raise InputError(
            f"{version} was made on {base_id}, which is private on the Hub, so others could not use it: "
            "give --base-id ORG/MODEL, a public copy, or the same id to name it all the same"
        )
    if not is_model_id(base_id):
        raise InputError(f"{base_id!r} is not the id of a model on the Hub: give --base-id ORG/MODEL")
    return base_id
