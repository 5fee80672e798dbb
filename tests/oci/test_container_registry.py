"""Versions pushed to a real container registry and pulled from it: equal digests, and each refusal its sentence."""

import base64
import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from adapterhub_local.cli.main import qhub
from adapterhub_local.digests import hex_of
from adapterhub_local.errors import BadFile, Corrupt, InputError, NotFound, RemoteError
from adapterhub_local.oci import client
from adapterhub_local.oci.address import Address
from adapterhub_local.oci.transfer import pull, push
from adapterhub_local.registry import Registry, Version
from tests.patience import PATIENCE
from tests.stores import LINEAGE, files, merged

PROGRAM = shutil.which("docker-registry")
needs_registry = pytest.mark.skipif(PROGRAM is None, reason="docker-registry is not installed: apt-get install it")
USER, PASSWORD = "someone", "secret"
BCRYPT = "$2b$04$KlfAB7yVBHm4.3Pz5ANSgOZ53GVgEikhVBpVtzKlMK6z7eAIaDX.a"  # of that password


class Served:
    """A running docker-registry over a folder."""

    def __init__(self, folder: Path, *, has_users: bool = False) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{probe.getsockname()[1]}"
        self.folder = folder
        users = folder.parent / "users"
        users.write_text(f"{USER}:{BCRYPT}\n")
        auth = f"auth:\n  htpasswd:\n    realm: here\n    path: {users}\n" if has_users else ""
        config = folder.parent / "config.yml"
        config.write_text(
            f"version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {folder}\n"
            f"http:\n  addr: {self.host}\n{auth}"
        )
        assert PROGRAM is not None
        self.process = subprocess.Popen(
            [PROGRAM, "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                httpx.get(f"http://{self.host}/v2/", trust_env=False)
                return
            except httpx.HTTPError:
                assert time.monotonic() < deadline
                assert self.process.poll() is None
                time.sleep(0.05)

    def blob(self, digest: str) -> Path:
        """The file in which the registry keeps a blob."""
        hexadecimal = hex_of(digest)
        return self.folder / "docker/registry/v2/blobs/sha256" / hexadecimal[:2] / hexadecimal / "data"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture(autouse=True)
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's credentials of registries lie; none at first."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "docker").mkdir()
    return tmp_path / "docker" / "config.json"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """An open registry."""
    running = Served(tmp_path / "storage")
    yield running
    running.stop()


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Served]:
    """A registry that wants user and password."""
    running = Served(tmp_path / "storage", has_users=True)
    yield running
    running.stop()


@pytest.fixture
def merge(registry: Registry) -> Version:
    """A merge of two parents that are here."""
    first, second = (registry.publish(name, files(seed), LINEAGE) for seed, name in ((1, "a"), (2, "team/b")))
    return merged(registry, "top", (first, 0.5), (second, 0.5))


def log_in(path: Path, host: str, password: str) -> None:
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))


@needs_registry
def test_what_is_pushed_comes_back_the_same(served: Served, registry: Registry, merge: Version, tmp_path: Path) -> None:
    """A version and what it was made of come back with equal digests, and any client of the protocol sees them."""
    address = Address.parse(f"oci://{served.host}/team/top:v1")
    done = push(registry, merge, address)
    assert (done.num_versions, done.moved_from, str(done.address)) == (3, None, str(address))
    told = httpx.get(f"http://{served.host}/v2/team/top/manifests/v1", trust_env=False,
                     headers={"Accept": "application/vnd.oci.image.manifest.v1+json"})  # fmt: skip
    assert told.headers["Docker-Content-Digest"] == merge.manifest_digest
    assert told.json()["artifactType"] == "application/vnd.qhub.adapter.v1+json"
    other = Registry(tmp_path / "other")
    received = pull(other, address)
    assert [one.reference for one in received] == ["a@1", "team/b@1", "top@1"]
    for one in received:
        here = registry.resolve(one.reference)
        assert (one.version.manifest_digest, one.version.content_digest) == (here.manifest_digest, here.content_digest)
    assert (other.resolve("top").path / "adapter_model.safetensors").read_bytes()
    assert not any(one.is_new for one in pull(other, address))
    assert pull(other, Address.parse(f"oci://{served.host}/team/top@{merge.manifest_digest}"))[-1].version.name == "top"


@needs_registry
def test_what_is_there_is_not_sent_again(served: Served, registry: Registry, merge: Version) -> None:
    """The second push sends nothing; another version moves the tag, and says from where."""
    address = Address.parse(f"oci://{served.host}/team/top:prod")
    assert push(registry, merge, address).num_bytes > 0
    again = push(registry, merge, address)
    assert (again.num_bytes, again.moved_from) == (0, None)
    newer = registry.publish("top", files(5), LINEAGE)
    assert push(registry, newer, address).moved_from == merge.manifest_digest
    assert pull(Registry(registry.home.root / "other"), address)[-1].version.manifest_digest == newer.manifest_digest
    assert str(push(registry, newer, Address.parse(f"oci://{served.host}/team/top")).address).endswith("/team/top:v2")


@needs_registry
def test_credentials(closed: Served, registry: Registry, merge: Version, no_credentials: Path, tmp_path: Path) -> None:
    """Without credentials, with wrong ones and with right ones: each is what it is."""
    address = Address.parse(f"oci://{closed.host}/team/top:v1")
    with pytest.raises(RemoteError, match=r"wants a user and a password: `docker login 127\.0\.0\.1"):
        push(registry, merge, address)
    log_in(no_credentials, closed.host, "wrong")
    with pytest.raises(RemoteError, match="refuses the credentials that are stored for it"):
        push(registry, merge, address)
    log_in(no_credentials, closed.host, PASSWORD)
    push(registry, merge, address)
    assert pull(Registry(tmp_path / "other"), address)[-1].version.manifest_digest == merge.manifest_digest
    no_credentials.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        pull(Registry(tmp_path / "third"), address)
    no_credentials.write_text(json.dumps({"credsStore": "desktop"}))
    with pytest.raises(InputError, match="with the helper 'desktop', which is not asked here"):
        pull(Registry(tmp_path / "third"), address)


@needs_registry
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damage_at_the_registry(
    damage: str, served: Served, registry: Registry, merge: Version, tmp_path: Path
) -> None:
    """A blob that is cut, changed or gone is found and named, and nothing is registered."""
    address = Address.parse(f"oci://{served.host}/team/top:v1")
    push(registry, merge, address)
    blob = served.blob(next(file.digest for file in merge.files if file.path.endswith(".safetensors")))
    data = blob.read_bytes()
    if damage == "gone":
        blob.unlink()
    else:
        blob.write_bytes(data[:-8] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    error = {"cut": (Corrupt, RemoteError), "flipped": Corrupt, "gone": (NotFound, RemoteError)}[damage]
    sentence = {"cut": "came with|broke off", "flipped": "does not match its digest", "gone": "has no|answered"}
    other = Registry(tmp_path / "other")
    with pytest.raises(error, match=sentence[damage]):
        pull(other, address)
    assert not other.names()


@needs_registry
def test_what_is_not_a_version_is_refused(served: Served, tmp_path: Path) -> None:
    """An image of somebody else, a tag or repository that is not there: refused with what it is."""
    address = Address.parse(f"oci://{served.host}/team/image:v1")
    config = client.File.of("config.json", b"{}")
    with client.Repository(address) as repository:
        repository.put_blob(config, b"{}")
        image = {"schemaVersion": 2, "mediaType": client.MANIFEST_TYPE, "layers": [],
                 "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config.digest,
                            "size": 2}}  # fmt: skip
        repository.put_manifest("v1", json.dumps(image).encode())
    with pytest.raises(BadFile, match="holds a manifest that is not one of an adapter version"):
        pull(Registry(tmp_path / "other"), address)
    for missing in (f"oci://{served.host}/team/image:v2", f"oci://{served.host}/nobody/none:v1"):
        with pytest.raises(NotFound, match="has no"):
            pull(Registry(tmp_path / "other"), Address.parse(missing))


@needs_registry
def test_the_verbs(served: Served, registry: Registry, merge: Version, tmp_path: Path) -> None:
    """`qhub push NAME oci://...` and `qhub pull oci://...` do it, and print digests."""
    run = CliRunner().invoke
    result = run(qhub, ["push", "top", f"oci://{served.host}/team/top", "--json"], catch_exceptions=False)
    told = json.loads(result.stdout)
    assert (told["address"], told["digest"]) == (f"oci://{served.host}/team/top:v1", merge.manifest_digest)
    env = {"QHUB_HOME": str(tmp_path / "other")}
    result = run(qhub, ["pull", told["address"]], env=env, catch_exceptions=False)
    assert f"top@1 pulled: {merge.manifest_digest}" in result.stdout
    assert json.loads(run(qhub, ["pull", told["address"], "--json"], env=env).stdout)[-1]["is_new"] is False
    assert "sent" in run(qhub, ["push", "top", told["address"]]).stdout


def test_a_registry_that_does_not_answer(registry: Registry, merge: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is silent is given up in time, and one that is not there is named."""
    monkeypatch.setattr(client, "TIMEOUT", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RemoteError, match="has not answered for"):
            push(registry, merge, Address.parse(f"oci://{host}/team/top:v1"))
    with pytest.raises(RemoteError, match="cannot be reached"):
        push(registry, merge, Address.parse(f"oci://{host}/team/top:v1"))


def test_a_token_is_asked_for_where_the_registry_says(no_credentials: Path) -> None:
    """A registry that wants a token names who gives it: it is asked with the credentials and the scope."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers["Host"]
            if self.path.startswith("/token"):
                asked.append(f"{self.path} {self.headers['Authorization']}")
                self.answer(200, json.dumps({"token": "t0ken"}).encode())
            elif self.headers["Authorization"] != "Bearer t0ken":
                said = f'Bearer realm="http://{host}/token",service="here",scope="repository:team/a:pull"'
                self.answer(401, b"{}", ("WWW-Authenticate", said))
            else:
                self.answer(200, b"{}")

        def answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
            self.send_response(status)
            for name, value in (("Content-Length", str(len(body))), *headers):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        host = f"127.0.0.1:{server.server_port}"
        log_in(no_credentials, host, PASSWORD)
        with client.Repository(Address.parse(f"oci://{host}/team/a:v1")) as repository:
            assert repository.manifest("v1") == b"{}"
        expected = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        assert asked == [f"/token?service=here&scope=repository%3Ateam%2Fa%3Apull Basic {expected}"]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("oci://ghcr.io/team/a:v1", "https://ghcr.io/v2/team/a"),
        ("oci://localhost:5000/a", "http://localhost:5000/v2/a"),
        ("oci://127.0.0.1:5000/team/a-b/c_d:V.1-x", "http://127.0.0.1:5000/v2/team/a-b/c_d"),
        ("oci://[::1]:5000/a@sha256:" + "0" * 64, "http://[::1]:5000/v2/a"),
        ("oci://10.0.0.1/a", "https://10.0.0.1/v2/a"),
    ],
)
def test_addresses(text: str, url: str) -> None:
    """An address is read and printed the same; only this machine is asked without encryption."""
    address = Address.parse(text)
    assert (str(address), address.url) == (text, url)


@pytest.mark.parametrize("rest", ["", "a", "h/", "h/A", "h/a:", "h/a:-x", "h/a@sha256:0", "h/a:v@sha256:" + "0" * 64,
                                  "h/../a", "h/a//b", "u@h/a", "h:x/a", "h/a?b", "h/a:v1/b"])  # fmt: skip
def test_bad_addresses(rest: str) -> None:
    """What is not an address is refused with how one is written."""
    with pytest.raises(InputError, match="write oci://HOST/TEAM/NAME:TAG"):
        Address.parse(f"oci://{rest}")
    with pytest.raises(InputError, match="say which version"):
        pull(Registry(), Address.parse("oci://localhost/a"))
