"""Adapters to and from the Hugging Face Hub. The only room that imports the Hub's API."""

from adapterhub_local.hub.find import Found, Freshness, outdated, search_hub
from adapterhub_local.hub.pull import PullResult, pull
from adapterhub_local.hub.push import PushResult, push
from adapterhub_local.hub.team import Pushed, push_all

__all__ = [
    "Found",
    "Freshness",
    "PullResult",
    "PushResult",
    "Pushed",
    "outdated",
    "pull",
    "push",
    "push_all",
    "search_hub",
]
