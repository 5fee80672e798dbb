"""Repositories: made, found and described; who asks, and whether a card is one."""

import json
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.hub_server.handler import REPO, Access, Answer, Handler, Route
from tests.hub_server.repo import Repo, entry_of


def create(call: Handler) -> Answer:
    wanted = json.loads(call.body)
    name = f"{wanted['organization']}/{wanted['name']}"
    url = {"url": f"{call.hub.endpoint}/{name}", "name": name}
    if not call.hub.may_create:
        return Answer(403, {"error": "You don't have the rights to create a model here"})
    if name in call.hub.repos:
        return Answer(409, {"error": "You already created this model repo", **url})
    call.hub.repos[name] = repo = Repo(private=wanted.get("visibility") == "private")
    repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
    return Answer(200, url)


def delete(call: Handler) -> Answer:
    call.check_right()
    wanted = json.loads(call.body)
    del call.hub.repos[f"{wanted['organization']}/{wanted['name']}"]
    return Answer(200, {})


def whoami(call: Handler) -> Answer:
    return Answer(200, {"name": "me", "type": "user", "orgs": []})


def validate(call: Handler) -> Answer:
    content = json.loads(call.body)["content"]
    try:
        front = yaml.safe_load(content.split("---")[1])
        if "/" not in front.get("base_model", "a/b").strip("/."):
            raise ValueError('"base_model" must be the id of a model')
        if front.get("language") == "klingon":
            raise ValueError('"language" must only contain lowercase characters and be an ISO 639 code')
    except (IndexError, AttributeError, ValueError, yaml.YAMLError) as error:
        return Answer(400, {"errors": [{"message": str(error)}], "warnings": []})
    return Answer(200, {"errors": [], "warnings": []})


def search(call: Handler) -> Answer:
    query = parse_qs(urlsplit(call.path).query)
    words, wanted = query.get("search", [""])[0], set(query.get("filter", []))
    found = []
    for name, repo in call.hub.repos.items():
        card = repo.files().get("README.md", b"").decode()
        front = yaml.safe_load(card.split("---")[1]) if card else {}
        tags = {*repo.hub_tags, front.get("library_name", ""), *front.get("tags", [])}
        if "base_model" in front:
            tags |= {f"base_model:{front['base_model']}", f"base_model:adapter:{front['base_model']}"}
        if words.lower() in name.lower() and wanted <= tags and not repo.private:
            about = {"_id": "1", "id": name, "private": False, "tags": sorted(tags - {""})}
            found.append({**about, "downloads": 7, "likes": 1, "lastModified": "2026-01-01T00:00:00.000Z"})
    return Answer(200, found[: int(query.get("limit", ["100"])[0])])


def info(call: Handler, repo: str, revision: str = "main") -> Answer:
    commit = call.commit(repo, revision)
    siblings = []
    for path, content in commit.files.items():
        sibling = {"rfilename": path}
        if "blobs" in parse_qs(urlsplit(call.path).query):
            entry = entry_of(path, content)
            size = call.hub.repos[repo].claimed_sizes.get(path, entry["size"])
            sibling |= {"size": size, "blobId": entry["oid"]}
            if "lfs" in entry:
                sibling["lfs"] = {"sha256": entry["lfs"]["oid"], "size": size, "pointerSize": 134}
        siblings.append(sibling)
    private = call.hub.repos[repo].private
    info = {"_id": "1", "id": repo, "modelId": repo, "sha": commit.oid, "private": private, "siblings": siblings}
    card = commit.files.get("README.md", b"").decode()
    front = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
    return Answer(200, {**info, "tags": [], "downloads": 0, "likes": 0, "cardData": front})


ROUTES = (
    Route("POST", r"/api/repos/create", create),
    Route("DELETE", r"/api/repos/delete", delete),
    Route("GET", r"/api/whoami-v2", whoami),
    Route("POST", r"/api/validate-yaml", validate, Access.ANYONE),
    Route("GET", r"/api/models", search, Access.ANYONE),
    Route("GET", rf"/api/models/{REPO}(?:/revision/(?P<revision>.+))?", info, Access.ANYONE),
)
