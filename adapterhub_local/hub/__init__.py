"""Adapters to and from the Hugging Face Hub. The only room that imports the Hub's API."""

from adapterhub_local.hub.pull import PullResult, pull
from adapterhub_local.hub.push import PushResult, push

__all__ = ["PullResult", "PushResult", "pull", "push"]
