"""Traffic that a remote splits: which version is each user's, and when a server that follows knows it."""

from collections.abc import Callable, Mapping, Sequence

from adapterhub_local.registry.remote_log import Log
from adapterhub_local.registry.remote_moves import move_alias, set_split
from adapterhub_local.registry.split import side_of

USERS = [f"user-{number}" for number in range(40)]
VERSIONS = {"prod": 1, "canary": 2}


def split_traffic(log: Log, name: str, split: Sequence[tuple[str, int]]) -> dict[str, str]:
    """Publish the aliases and the split of `name`, which has two versions; user -> the adapter that answers."""
    for alias, number in VERSIONS.items():
        move_alias(log, name, alias, number)
    set_split(log, name, split)
    return {user: f"{name}@{VERSIONS[side_of(split, name, user)]}" for user in USERS}


def is_known(answering: Callable[[str], str | None], sides: Mapping[str, str]) -> bool:
    """Whether a user of each side gets it, the newest first.

    Without the split both would get the newest, which is version 1 for a moment and then 2.
    """
    ends = [next(user for user in USERS if sides[user] == adapter) for adapter in sorted(set(sides.values()))[::-1]]
    assert len(ends) == len(VERSIONS), "both sides have users"
    return all(answering(user) == sides[user] for user in ends)
