"""A process that pushes and is killed: light, so that many can be forked in a moment."""

from adapterhub_local.hub import push
from adapterhub_local.registry import Registry


def push_from(home: str, repo_id: str, token: str, endpoint: str) -> None:
    """Push the newest `sentiment` of this home, with a branch for its alias."""
    push(Registry(home), "sentiment", repo_id, token=token, endpoint=endpoint, aliases=["prod"])
