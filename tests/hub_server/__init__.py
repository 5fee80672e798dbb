"""A Hub on loopback: the parts of the Hugging Face Hub's HTTP protocol that models need, over real sockets.

    with HubServer() as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("me/x")
        hub.repos["me/x"].files()          # path -> bytes at the head of main
        hub.calls("POST", "/commit/")      # what was asked, for assertions

Commits, pull requests, branches, tags, LFS (basic, multipart, verify), 412 for a stale parent, ranges, redirects of
renamed repositories and of large files to another host; no xet. `before` is called with (method, path) ahead of every
request, which is lost if it returns False; `disturb` spoils answers to come: refuse, drop, lose, cut and slow ones.
"""

from tests.hub_server.repo import Commit, Repo
from tests.hub_server.server import HubServer

__all__ = ["Commit", "HubServer", "Repo"]
