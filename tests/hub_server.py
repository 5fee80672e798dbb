"""A Hub on loopback: the parts of the Hugging Face Hub's HTTP protocol that models need, over real sockets.

    with HubServer() as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("me/x")
        hub.repos["me/x"].files()          # path -> bytes at the head of main
        hub.calls("POST", "/commit/")      # what was asked, for assertions

Commits, pull requests, branches, tags, LFS (basic, multipart, verify), 412 for a stale parent, ranges, redirects of
renamed repositories and of large files to another host; no xet. `before` is called with (method, path) ahead of every
request, which is lost if it returns False; `disturb` spoils answers to come: refuse, drop, lose, cut and slow ones.
"""

import base64
import hashlib
import json
import re
import time
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
    pull_requests: dict[str, str] = field(default_factory=dict)  # refs/pr/1 -> commit
    claimed_sizes: dict[str, int] = field(default_factory=dict)  # lies about sizes: path -> bytes
    hub_tags: list[str] = field(default_factory=list)

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
        named = self.branches.get(revision) or self.tags.get(revision) or self.pull_requests.get(revision)
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
        self.before: Callable[[str, str], bool | None] | None = None
        self.disturbances: list[list] = []
        self.may_create = self.may_write = True
        self.renamed: dict[str, str] = {}
        self.large_files_elsewhere = False
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

    def disturb(self, part: str, kind: str | int, times: int = 1) -> None:
        """Spoil the next answers to paths with `part` in them.

        `kind` is a status that is answered instead, "drop" (the connection breaks before the work), "lose" (after
        the work), "cut" (in the middle of the answer), "slow" (the answer comes in pieces) or "flip" (a bit is wrong).
        """
        self.disturbances.append([part, kind, times])

    def disturbance(self, path: str) -> str | int | None:
        """What is to go wrong with this request."""
        for entry in self.disturbances:
            if entry[0] in path and entry[2] > 0:
                entry[2] -= 1
                return entry[1]
        return None

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
        ("DELETE", rf"/api/models/{REPO}/branch/(?P<revision>.+)", "delete_branch"),
        ("GET", r"/api/models", "list"),
        ("GET", r"/large/(?P<oid>\w+)", "large"),
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
        if self.hub.before is not None and self.hub.before(self.command, path) is False:
            self.close_connection = True  # the request was lost on its way
            return
        with self.hub.lock:
            kind = self.hub.disturbance(path)
            try:
                if kind == "drop" or isinstance(kind, int):
                    raise _Answer(kind if isinstance(kind, int) else 0, {"error": "no"}, Retry_After="0")
                answer = self._route(path)
            except _Answer as raised:
                answer = raised
            self.hub.requests.append(Request(self.command, path, self.body, answer.status))
        if kind in ("drop", "lose"):
            self.close_connection = True
            return
        self._send(answer, kind)

    def _send(self, answer: "_Answer", kind: str | int | None) -> None:
        body = answer.body
        if kind == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(answer.status)
        for key, value in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif kind == "slow":
            for start in range(0, len(body), max(1, len(body) // 5)):
                self.wfile.write(body[start : start + max(1, len(body) // 5)])
                self.wfile.flush()
                time.sleep(0.02)
        else:
            self.wfile.write(body)

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
                if name not in ("upload", "complete", "large"):  # those go to addresses that were signed before
                    self._authorise(name)
                if new := self.hub.renamed.get(values.get("repo", "")):
                    raise _Answer(307, b"", Location=self.path.replace(values["repo"], new, 1))
                return getattr(self, f"on_{name}")(**values) or _Answer(200, {})
        return _Answer(404, {"error": f"no such page: {self.command} {path}"})

    def _authorise(self, name: str) -> None:
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {self.hub.token}":
            raise _Answer(401, {"error": "Invalid username or password."})
        if given is None and name not in (
            "refs",
            "commits",
            "tree",
            "paths_info",
            "info",
            "download",
            "validate",
            "list",
        ):
            raise _Answer(401, {"error": "Invalid username or password."})

    def _check_right(self) -> None:
        if not self.hub.may_write and "create_pr" not in urlsplit(self.path).query:
            raise _Answer(403, {"error": "You don't have the rights to write here"})

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
        self._check_right()
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
        found, there = self.hub.repos[repo], {}
        if "create_pr" in urlsplit(self.path).query:
            number = len(found.pull_requests) + 1
            oid = found.commit(changes, message, revision)
            found.branches[revision], found.pull_requests[f"refs/pr/{number}"] = head, oid
            there = {"pullRequestUrl": f"{self.hub.endpoint}/{repo}/discussions/{number}"}
        else:
            oid = found.commit(changes, message, revision)
        return _Answer(200, {"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", **there})

    def on_tag(self, repo: str, revision: str) -> _Answer:
        self._check_right()
        commit, tag = self._commit(repo, revision), json.loads(self.body)["tag"]
        if tag in self.hub.repos[repo].tags:
            return _Answer(409, {"error": "Tag already exists"})
        self.hub.repos[repo].tags[tag] = commit.oid
        return _Answer(200, {})

    def on_delete_tag(self, repo: str, revision: str) -> None:
        self._repo(repo).tags.pop(revision)

    def on_branch(self, repo: str, revision: str) -> None:
        self._check_right()
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        if revision in self._repo(repo).branches:
            raise _Answer(409, {"error": "Reference already exists"})
        self._repo(repo).branches[revision] = self._commit(repo, start).oid

    def on_delete_branch(self, repo: str, revision: str) -> None:
        self._check_right()
        self._repo(repo).branches.pop(revision)

    def on_list(self) -> _Answer:
        query = parse_qs(urlsplit(self.path).query)
        words, wanted = query.get("search", [""])[0], set(query.get("filter", []))
        found = []
        for name, repo in self.hub.repos.items():
            card = repo.files().get("README.md", b"").decode()
            front = yaml.safe_load(card.split("---")[1]) if card else {}
            tags = {*repo.hub_tags, front.get("library_name", ""), *front.get("tags", [])}
            if "base_model" in front:
                tags |= {f"base_model:{front['base_model']}", f"base_model:adapter:{front['base_model']}"}
            if words.lower() in name.lower() and wanted <= tags and not repo.private:
                about = {"_id": "1", "id": name, "private": False, "tags": sorted(tags - {""})}
                found.append({**about, "downloads": 7, "likes": 1, "lastModified": "2026-01-01T00:00:00.000Z"})
        return _Answer(200, found[: int(query.get("limit", ["100"])[0])])

    def on_refs(self, repo: str) -> _Answer:
        found = self._repo(repo)

        def listed(kind: str, refs: dict[str, str]) -> list[dict]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        branches, tags = listed("heads", found.branches), listed("tags", found.tags)
        requests = [{"name": ref, "ref": ref, "targetCommit": oid} for ref, oid in found.pull_requests.items()]
        more = {"pullRequests": requests} if "include_prs" in urlsplit(self.path).query else {}
        return _Answer(200, {"branches": branches, "tags": tags, "converts": [], **more})

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
        files, wanted = self._commit(repo, unquote(revision)).files, parse_qs(self.body.decode())["paths"]
        return _Answer(200, [_entry(path, files[path]) for path in wanted if path in files])

    def on_info(self, repo: str, revision: str = "main") -> _Answer:
        commit = self._commit(repo, revision)
        siblings = []
        for path, content in commit.files.items():
            sibling = {"rfilename": path}
            if "blobs" in parse_qs(urlsplit(self.path).query):
                entry = _entry(path, content)
                size = self.hub.repos[repo].claimed_sizes.get(path, entry["size"])
                sibling |= {"size": size, "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = {"sha256": entry["lfs"]["oid"], "size": size, "pointerSize": 134}
            siblings.append(sibling)
        private = self.hub.repos[repo].private
        info = {"_id": "1", "id": repo, "modelId": repo, "sha": commit.oid, "private": private, "siblings": siblings}
        card = commit.files.get("README.md", b"").decode()
        front = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
        return _Answer(200, {**info, "tags": [], "downloads": 0, "likes": 0, "cardData": front})

    def on_download(self, repo: str, revision: str, path: str) -> _Answer:
        commit = self._commit(repo, revision)
        if path not in commit.files:
            return _Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        content = commit.files[path]
        entry = _entry(path, content)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        if "lfs" in entry and self.hub.large_files_elsewhere:
            self.hub.lfs[etag] = content
            there = self.hub.endpoint.replace("127.0.0.1", "localhost") + f"/large/{etag}"
            linked = {"X_Linked_Size": str(len(content)), "X_Linked_ETag": f'"{etag}"'}
            return _Answer(302, b"", Location=there, X_Repo_Commit=commit.oid, **linked)
        return self._part_of(content, ETag=f'"{etag}"', X_Repo_Commit=commit.oid)

    def on_large(self, oid: str) -> _Answer:
        return self._part_of(self.hub.lfs[oid], ETag=f'"{oid}"')

    def _part_of(self, content: bytes, **headers: str) -> _Answer:
        """All of `content`, or the bytes that the request asks for: 206, or 416 where there are none."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return _Answer(200, content, Accept_Ranges="bytes", **headers)
        start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            return _Answer(416, b"", Content_Range=f"bytes */{len(content)}", **headers)
        place = f"bytes {start}-{end}/{len(content)}"
        return _Answer(206, content[start : end + 1], Content_Range=place, Accept_Ranges="bytes", **headers)
