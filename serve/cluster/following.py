"""Following: every process of a cluster keeps its home as the cluster's remote says."""

from collections.abc import Mapping
from typing import Any

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.registry import Registry
from serve.adapters.compatibility import check_base
from serve.cluster.config import ClusterConfig
from serve.follow import Follower


def follow(config: ClusterConfig, registry: Registry, base: BaseInfo) -> Follower | None:
    """What follows the cluster's remote and has begun to, None if there is no remote.

    Raises what reading the remote for the first time raises. Several processes may follow into one home.
    """
    if config.followed is None:
        return None
    follower = Follower(registry, config.followed, lambda version: check_base(version, base))
    follower.begin()
    return follower


def shortly(follower: Follower | None) -> Mapping[str, Any]:
    """Whether the remote answers, where balancers look; nothing without one."""
    return {} if follower is None else {"remote": "away" if follower.is_away else "following"}
