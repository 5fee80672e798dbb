"""History: commits, pull requests, branches and tags."""

import base64
import json
from urllib.parse import urlsplit

from tests.hub_server.handler import REPO, Access, Answer, Handler, Route


def add_commit(call: Handler, repo: str, revision: str) -> Answer:
    call.check_right()
    head = call.commit(repo, revision).oid
    changes: dict[str, bytes | None] = {}
    message = ""
    for line in call.body.splitlines():
        kind, value = (item := json.loads(line))["key"], item["value"]
        if kind == "header":
            message = value["summary"]
            if value.get("parentCommit") not in (None, head):
                return Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        elif kind == "file":
            changes[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            changes[value["path"]] = call.hub.lfs[value["oid"]]
        elif kind == "deletedFile":
            changes[value["path"]] = None
    found, there = call.hub.repos[repo], {}
    if "create_pr" in urlsplit(call.path).query:
        number = len(found.pull_requests) + 1
        oid = found.commit(changes, message, revision)
        found.branches[revision], found.pull_requests[f"refs/pr/{number}"] = head, oid
        there = {"pullRequestUrl": f"{call.hub.endpoint}/{repo}/discussions/{number}"}
    else:
        oid = found.commit(changes, message, revision)
    return Answer(200, {"commitOid": oid, "commitUrl": f"{call.hub.endpoint}/{repo}/commit/{oid}", **there})


def log(call: Handler, repo: str, revision: str) -> Answer:
    oid: str | None = call.commit(repo, revision).oid
    history = []
    while oid:
        commit = call.hub.repos[repo].commits[oid]
        date = "2026-01-01T00:00:00.000Z"
        history.append({"id": oid, "title": commit.message, "message": "", "authors": [], "date": date})
        oid = commit.parent
    return Answer(200, history)


def add_tag(call: Handler, repo: str, revision: str) -> Answer:
    call.check_right()
    commit, tag = call.commit(repo, revision), json.loads(call.body)["tag"]
    if tag in call.hub.repos[repo].tags:
        return Answer(409, {"error": "Tag already exists"})
    call.hub.repos[repo].tags[tag] = commit.oid
    return Answer(200, {})


def delete_tag(call: Handler, repo: str, revision: str) -> None:
    call.repo(repo).tags.pop(revision)


def add_branch(call: Handler, repo: str, revision: str) -> None:
    call.check_right()
    start = json.loads(call.body or b"{}").get("startingPoint", "main")
    if revision in call.repo(repo).branches:
        raise Answer(409, {"error": "Reference already exists"})
    call.repo(repo).branches[revision] = call.commit(repo, start).oid


def delete_branch(call: Handler, repo: str, revision: str) -> None:
    call.check_right()
    call.repo(repo).branches.pop(revision)


def refs(call: Handler, repo: str) -> Answer:
    found = call.repo(repo)

    def listed(kind: str, refs: dict[str, str]) -> list[dict]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

    branches, tags = listed("heads", found.branches), listed("tags", found.tags)
    requests = [{"name": ref, "ref": ref, "targetCommit": oid} for ref, oid in found.pull_requests.items()]
    more = {"pullRequests": requests} if "include_prs" in urlsplit(call.path).query else {}
    return Answer(200, {"branches": branches, "tags": tags, "converts": [], **more})


ROUTES = (
    Route("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)", add_commit),
    Route("GET", rf"/api/models/{REPO}/commits/(?P<revision>.+)", log, Access.ANYONE),
    Route("POST", rf"/api/models/{REPO}/tag/(?P<revision>.+)", add_tag),
    Route("DELETE", rf"/api/models/{REPO}/tag/(?P<revision>.+)", delete_tag),
    Route("POST", rf"/api/models/{REPO}/branch/(?P<revision>.+)", add_branch),
    Route("DELETE", rf"/api/models/{REPO}/branch/(?P<revision>.+)", delete_branch),
    Route("GET", rf"/api/models/{REPO}/refs", refs, Access.ANYONE),
)
