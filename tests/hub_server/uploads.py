"""Uploads: which files go where, large ones in parts, and whether they arrived whole."""

import hashlib
import json

from tests.hub_server.handler import REPO, Access, Answer, Handler, Route
from tests.hub_server.repo import entry_of, is_large


def preupload(call: Handler, repo: str, revision: str) -> Answer:
    there = call.commit(repo, revision).files
    files = []
    for wanted in json.loads(call.body)["files"]:
        path, size = wanted["path"], wanted["size"]
        mode = "lfs" if is_large(path, size) else "regular"
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in there:
            entry = entry_of(path, there[path])
            answer["oid"] = entry["lfs"]["oid"] if mode == "lfs" else entry["oid"]
        files.append(answer)
    return Answer(200, {"files": files})


def batch(call: Handler, repo: str) -> Answer:
    call.repo(repo)
    objects = []
    for wanted in json.loads(call.body)["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        href = f"{call.hub.endpoint}/lfs/{oid}"
        upload: dict = {"href": href}
        if size > call.hub.multipart_above:
            chunk = call.hub.multipart_above
            parts = {str(part): f"{href}/{part}" for part in range(1, -(-size // chunk) + 1)}
            upload = {"href": f"{href}/complete", "header": {"chunk_size": str(chunk), **parts}}
        actions = {"upload": upload, "verify": {"href": f"{href}/verify"}}
        objects.append({"oid": oid, "size": size} | ({} if oid in call.hub.lfs else {"actions": actions}))
    return Answer(200, {"transfer": "basic", "objects": objects})


def upload(call: Handler, oid: str, part: str | None = None) -> Answer:
    if part is None:
        if hashlib.sha256(call.body).hexdigest() != oid:
            return Answer(400, {"error": "the bytes are not those that were announced"})
        call.hub.lfs[oid] = call.body
    else:
        call.hub.parts.setdefault(oid, {})[int(part)] = call.body
    return Answer(200, b"", ETag=f'"{part or 0}"')


def complete(call: Handler, oid: str) -> Answer:
    parts = call.hub.parts.pop(oid)
    listed = [part["partNumber"] for part in json.loads(call.body)["parts"]]
    call.hub.lfs[oid] = b"".join(parts[number] for number in listed)
    return Answer(200, {})


def verify(call: Handler, oid: str) -> Answer:
    is_there = oid in call.hub.lfs and len(call.hub.lfs[oid]) == json.loads(call.body)["size"]
    return Answer(200 if is_there else 404, {})


ROUTES = (
    Route("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)", preupload),
    Route("POST", rf"/{REPO}\.git/info/lfs/objects/batch", batch),
    Route("PUT", r"/lfs/(?P<oid>\w+)(?:/(?P<part>\d+))?", upload, Access.SIGNED),
    Route("POST", r"/lfs/(?P<oid>\w+)/complete", complete, Access.SIGNED),
    Route("POST", r"/lfs/(?P<oid>\w+)/verify", verify),
)
