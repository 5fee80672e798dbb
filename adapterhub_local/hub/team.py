"""`push_all`: a whole registry to an organisation of the Hub, each name a repository, each version a tag."""

from dataclasses import asdict, dataclass
from typing import Any

from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.hub.client import check_repo_id
from adapterhub_local.hub.patience import Note
from adapterhub_local.hub.push import PushResult, check_branch, push
from adapterhub_local.registry import Registry


@dataclass(frozen=True)
class Pushed:
    """What became of one version: where it is, or why it is not there."""

    reference: str
    result: PushResult | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def push_all(
    registry: Registry,
    organisation: str,
    *,
    base_id: str | None = None,
    private: bool = False,
    licence: str | None = None,
    licence_name: str | None = None,
    licence_link: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    note: Note | None = None,
) -> list[Pushed]:
    """Push every version of every name to `organisation`/<name>, oldest first, and its aliases as branches.

    A '/' in a name becomes '-'. A version that cannot be pushed does not hold up the others; `note` gets a line about
    long waits, for the Hub counts requests. Raises InputError
    if there is nothing to push, or two names would share a repository.
    """
    names = registry.names()
    if not names:
        raise InputError("there is nothing to push: the registry has no versions")
    repos = {name: check_repo_id(f"{organisation}/{name.replace('/', '-')}") for name in names}
    if len(set(repos.values())) < len(names):
        shared = next(repo for repo in repos.values() if list(repos.values()).count(repo) > 1)
        raise InputError(f"several names would go to {shared}: push them one by one, each to a repository of its own")
    done = []
    for name in names:
        pointed = registry.aliases(name)
        for version in registry.versions(name):
            aliases = [alias for alias, number in pointed.items() if number == version.number and alias != "main"]
            try:
                for alias in aliases:
                    check_branch(alias)
                result = push(
                    registry, str(version), repos[name], base_id=base_id, private=private, aliases=aliases,
                    licence=licence, licence_name=licence_name, licence_link=licence_link, token=token,
                    endpoint=endpoint, note=note,
                )  # fmt: skip
            except QhubError as error:
                done.append(Pushed(str(version), error=str(error)))
            else:
                done.append(Pushed(str(version), result))
    return done
