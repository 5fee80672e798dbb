"""A Hub on loopback: the parts of the Hugging Face Hub's HTTP protocol that models need, over real sockets.

    with HubServer() as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("me/x")
        hub.repos["me/x"].files()          # path -> bytes at the head of main
        hub.calls("POST", "/commit/")      # what was asked, for assertions

Commits, branches, tags, LFS (basic, multipart, verify) and 412 for a stale parent; no xet. `before` is called
with (method, path) ahead of every request, `lose_reply` drops one answer after the work was done.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """One model repository, its history in memory."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, changes: dict[str, bytes | None], message: str = "change", branch: str = "main") -> str:
        """Add a commit on `branch`; None removes a file."""
        parent = self.branches.get(branch)
        files = dict(self.commits[parent].files) if parent else {}
        for path, content in changes.items():
            files.pop(path, None)
            if content is not None:
                files[path] = content
        oid = hashlib.sha1(f"{parent}{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, message, files)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        named = self.branches.get(revision) or self.tags.get(revision)
        return named or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)].files


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: bytes
    status: int


class HubServer:
    """The server and all it knows; `requests` are those it answered, in order."""

    def __init__(self, *, multipart_above: int = 5 << 20) -> None:
        self.token = "hf_test"
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[Request] = []
        self.before: Callable[[str, str], None] | None = None
        self.lose_reply: str | None = None
        self.may_create = True
        self.multipart_above = multipart_above
        self.lock = RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> "HubServer":
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def calls(self, method: str = "", part: str = "") -> list[Request]:
        """The requests with this method, whose path has `part` in it."""
        return [request for request in self.requests if request.method.startswith(method) and part in request.path]

    @property
    def lfs_bytes(self) -> int:
        """How many bytes of large files were sent."""
        return sum(len(request.body) for request in self.calls("PUT"))


class _Answer(Exception):
    """An answer given from anywhere: status, body, headers."""

    def __init__(self, status: int, body: object = b"", **headers: str) -> None:
        self.status, self.headers = status, headers
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(path: str, size: int) -> bool:
    return path.endswith((".safetensors", ".bin")) or size > 10 << 20


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
    if _is_large(path, len(content)):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
    wbufsize = -1
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)", "preupload"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)(?:/(?P<part>\d+))?", "upload"),
        ("POST", r"/lfs/(?P<oid>\w+)/complete", "complete"),
        ("POST", r"/lfs/(?P<oid>\w+)/verify", "verify"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)", "commit"),
        ("POST", rf"/api/models/{REPO}/tag/(?P<revision>.+)", "tag"),
        ("DELETE", rf"/api/models/{REPO}/tag/(?P<revision>.+)", "delete_tag"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<revision>.+)", "branch"),
        ("GET", rf"/api/models/{REPO}/refs", "refs"),
        ("GET", rf"/api/models/{REPO}/commits/(?P<revision>.+)", "commits"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", "tree"),
        ("POST", rf"/api/models/{REPO}/paths-info/(?P<revision>.+)", "paths_info"),
        ("GET", rf"/api/models/{REPO}(?:/revision/(?P<revision>.+))?", "info"),
        ("HEAD|GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
    )

    def handle_one(self) -> None:
        path = urlsplit(self.path).path
        self.body = self._read_body()
        if self.hub.before is not None:
            self.hub.before(self.command, path)
        with self.hub.lock:
            try:
                answer = self._route(path)
            except _Answer as raised:
                answer = raised
            self.hub.requests.append(Request(self.command, path, self.body, answer.status))
        if self.hub.lose_reply and self.hub.lose_reply in path:
            self.hub.lose_reply = None
            self.close_connection = True
            return
        self.send_response(answer.status)
        for key, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Tests look at `requests` instead."""

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, path: str) -> _Answer:
        for methods, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                values = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if name not in ("upload", "complete"):  # those go to addresses that were signed before
                    self._authorise(name)
                return getattr(self, f"on_{name}")(**values) or _Answer(200, {})
        return _Answer(404, {"error": f"no such page: {self.command} {path}"})

    def _authorise(self, name: str) -> None:
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {self.hub.token}":
            raise _Answer(401, {"error": "Invalid username or password."})
        if given is None and name not in ("refs", "commits", "tree", "paths_info", "info", "download", "validate"):
            raise _Answer(401, {"error": "Invalid username or password."})

    def _repo(self, name: str) -> Repo:
        found = self.hub.repos.get(name)
        if found is None or (found.private and "Authorization" not in self.headers):
            status = 404 if "Authorization" in self.headers else 401
            raise _Answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return found

    def _commit(self, repo: str, revision: str) -> Commit:
        found = self._repo(repo)
        oid = found.resolve(revision)
        if oid is None:
            raise _Answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        return found.commits[oid]

    def on_create(self) -> _Answer:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if not self.hub.may_create:
            return _Answer(403, {"error": "You don't have the rights to create a model here"})
        if name in self.hub.repos:
            return _Answer(409, {"error": "You already created this model repo", **url})
        self.hub.repos[name] = repo = Repo(private=wanted.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return _Answer(200, url)

    def on_whoami(self) -> _Answer:
        return _Answer(200, {"name": "me", "type": "user", "orgs": []})

    def on_validate(self) -> _Answer:
        content = json.loads(self.body)["content"]
        try:
            front = yaml.safe_load(content.split("---")[1])
            if "/" not in front.get("base_model", "a/b").strip("/."):
                raise ValueError('"base_model" must be the id of a model')
        except (IndexError, AttributeError, ValueError, yaml.YAMLError) as error:
            return _Answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        return _Answer(200, {"errors": [], "warnings": []})

    def on_preupload(self, repo: str, revision: str) -> _Answer:
        there = self._commit(repo, revision).files
        files = []
        for wanted in json.loads(self.body)["files"]:
            path, size = wanted["path"], wanted["size"]
            mode = "lfs" if _is_large(path, size) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in there:
                entry = _entry(path, there[path])
                answer["oid"] = entry["lfs"]["oid"] if mode == "lfs" else entry["oid"]
            files.append(answer)
        return _Answer(200, {"files": files})

    def on_batch(self, repo: str) -> _Answer:
        self._repo(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            href = f"{self.hub.endpoint}/lfs/{oid}"
            upload: dict = {"href": href}
            if size > self.hub.multipart_above:
                chunk = self.hub.multipart_above
                parts = {str(part): f"{href}/{part}" for part in range(1, -(-size // chunk) + 1)}
                upload = {"href": f"{href}/complete", "header": {"chunk_size": str(chunk), **parts}}
            actions = {"upload": upload, "verify": {"href": f"{href}/verify"}}
            objects.append({"oid": oid, "size": size} | ({} if oid in self.hub.lfs else {"actions": actions}))
        return _Answer(200, {"transfer": "basic", "objects": objects})

    def on_upload(self, oid: str, part: str | None = None) -> _Answer:
        if part is None:
            if hashlib.sha256(self.body).hexdigest() != oid:
                return _Answer(400, {"error": "the bytes are not those that were announced"})
            self.hub.lfs[oid] = self.body
        else:
            self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        return _Answer(200, b"", ETag=f'"{part or 0}"')

    def on_complete(self, oid: str) -> _Answer:
        parts = self.hub.parts.pop(oid)
        listed = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self.hub.lfs[oid] = b"".join(parts[number] for number in listed)
        return _Answer(200, {})

    def on_verify(self, oid: str) -> _Answer:
        is_there = oid in self.hub.lfs and len(self.hub.lfs[oid]) == json.loads(self.body)["size"]
        return _Answer(200 if is_there else 404, {})

    def on_commit(self, repo: str, revision: str) -> _Answer:
        head = self._commit(repo, revision).oid
        changes: dict[str, bytes | None] = {}
        message = ""
        for line in self.body.splitlines():
            kind, value = (item := json.loads(line))["key"], item["value"]
            if kind == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    return _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            elif kind == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                changes[value["path"]] = self.hub.lfs[value["oid"]]
            elif kind == "deletedFile":
                changes[value["path"]] = None
        oid = self.hub.repos[repo].commit(changes, message, revision)
        return _Answer(200, {"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"})

    def on_tag(self, repo: str, revision: str) -> _Answer:
        commit, tag = self._commit(repo, revision), json.loads(self.body)["tag"]
        if tag in self.hub.repos[repo].tags:
            return _Answer(409, {"error": "Tag already exists"})
        self.hub.repos[repo].tags[tag] = commit.oid
        return _Answer(200, {})

    def on_delete_tag(self, repo: str, revision: str) -> None:
        self._repo(repo).tags.pop(revision)

    def on_branch(self, repo: str, revision: str) -> None:
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        self._repo(repo).branches[revision] = self._commit(repo, start).oid

    def on_refs(self, repo: str) -> _Answer:
        found = self._repo(repo)

        def listed(kind: str, refs: dict[str, str]) -> list[dict]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        branches, tags = listed("heads", found.branches), listed("tags", found.tags)
        return _Answer(200, {"branches": branches, "tags": tags, "converts": []})

    def on_commits(self, repo: str, revision: str) -> _Answer:
        oid: str | None = self._commit(repo, revision).oid
        history = []
        while oid:
            commit = self.hub.repos[repo].commits[oid]
            date = "2026-01-01T00:00:00.000Z"
            history.append({"id": oid, "title": commit.message, "message": "", "authors": [], "date": date})
            oid = commit.parent
        return _Answer(200, history)

    def on_tree(self, repo: str, revision: str) -> _Answer:
        return _Answer(200, [_entry(path, content) for path, content in self._commit(repo, revision).files.items()])

    def on_paths_info(self, repo: str, revision: str) -> _Answer:
        files, wanted = self._commit(repo, revision).files, parse_qs(self.body.decode())["paths"]
        return _Answer(200, [_entry(path, files[path]) for path in wanted if path in files])

    def on_info(self, repo: str, revision: str = "main") -> _Answer:
        commit = self._commit(repo, revision)
        siblings = []
        for path, content in commit.files.items():
            sibling = {"rfilename": path}
            if "blobs" in parse_qs(urlsplit(self.path).query):
                entry = _entry(path, content)
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134}
            siblings.append(sibling)
        private = self.hub.repos[repo].private
        info = {"_id": "1", "id": repo, "modelId": repo, "sha": commit.oid, "private": private, "siblings": siblings}
        return _Answer(200, {**info, "tags": [], "downloads": 0, "likes": 0})

    def on_download(self, repo: str, revision: str, path: str) -> _Answer:
        commit = self._commit(repo, revision)
        if path not in commit.files:
            return _Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        content = commit.files[path]
        entry = _entry(path, content)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        return _Answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit.oid, Accept_Ranges="none")
