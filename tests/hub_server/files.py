"""Files: listed, and read whole or in part, also from another host."""

import re
from urllib.parse import parse_qs, unquote

from tests.hub_server.handler import REPO, Access, Answer, Handler, Route
from tests.hub_server.repo import entry_of


def tree(call: Handler, repo: str, revision: str) -> Answer:
    return Answer(200, [entry_of(path, content) for path, content in call.commit(repo, revision).files.items()])


def paths_info(call: Handler, repo: str, revision: str) -> Answer:
    files, wanted = call.commit(repo, unquote(revision)).files, parse_qs(call.body.decode())["paths"]
    return Answer(200, [entry_of(path, files[path]) for path in wanted if path in files])


def download(call: Handler, repo: str, revision: str, path: str) -> Answer:
    commit = call.commit(repo, revision)
    if path not in commit.files:
        return Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
    content = commit.files[path]
    entry = entry_of(path, content)
    etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
    if "lfs" in entry and call.hub.large_files_elsewhere:
        call.hub.lfs[etag] = content
        there = call.hub.endpoint.replace("127.0.0.1", "localhost") + f"/large/{etag}"
        linked = {"X_Linked_Size": str(len(content)), "X_Linked_ETag": f'"{etag}"'}
        return Answer(302, b"", Location=there, X_Repo_Commit=commit.oid, **linked)
    return _part_of(call, content, ETag=f'"{etag}"', X_Repo_Commit=commit.oid)


def large(call: Handler, oid: str) -> Answer:
    return _part_of(call, call.hub.lfs[oid], ETag=f'"{oid}"')


def _part_of(call: Handler, content: bytes, **headers: str) -> Answer:
    """All of `content`, or the bytes that the request asks for: 206, or 416 where there are none."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or "")
    if asked is None:
        return Answer(200, content, Accept_Ranges="bytes", **headers)
    start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
    if start >= len(content):
        return Answer(416, b"", Content_Range=f"bytes */{len(content)}", **headers)
    place = f"bytes {start}-{end}/{len(content)}"
    return Answer(206, content[start : end + 1], Content_Range=place, Accept_Ranges="bytes", **headers)


ROUTES = (
    Route("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", tree, Access.ANYONE),
    Route("POST", rf"/api/models/{REPO}/paths-info/(?P<revision>.+)", paths_info, Access.ANYONE),
    Route("HEAD|GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", download, Access.ANYONE),
    Route("GET", r"/large/(?P<oid>\w+)", large, Access.SIGNED),
)
