"""Push and pull over real HTTP against a Hub on loopback."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import close_session

from adapterhub_local.base.bases import find_base
from adapterhub_local.errors import (
    Corrupt,
    HubError,
    InputError,
    InUse,
)
from adapterhub_local.hub import package as packages
from adapterhub_local.hub import push, search_hub
from adapterhub_local.hub.package import CARD, MANIFEST
from adapterhub_local.lora import write
from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.hub_adapters import BASE, REPO, publish, pulled, pushed
from tests.hub_server import HubServer, Repo
from tests.patience import PATIENCE


def test_new_adapter_is_one_commit_and_one_tag_in_nine_calls(hub: HubServer, registry: Registry) -> None:
    """A first push makes the repository, one commit on the one before, one tag, and needs 9 HTTP calls."""
    version = publish(registry)

    result = pushed(hub, registry)

    repo = hub.repos[REPO]
    assert (len(hub.calls("POST", "/commit/")), len(hub.calls("POST", "/tag/"))) == (1, 1)
    assert b'"parentCommit": "' in hub.calls("POST", "/commit/")[0].body
    assert len(hub.requests) == 9
    assert repo.tags == {"v1": result.commit}
    assert set(repo.files("v1")) == {".gitattributes", WEIGHTS, CONFIG, CARD, MANIFEST}
    assert repo.files("v1")[WEIGHTS] == (version.path / WEIGHTS).read_bytes()
    assert (result.tag, result.unchanged) == ("v1", False)
    assert hub.lfs_bytes == (version.path / WEIGHTS).stat().st_size


def test_unchanged_adapter_is_not_sent_again(hub: HubServer, registry: Registry) -> None:
    """Pushing a version that is there sends no bytes of weights and makes neither commit nor tag."""
    publish(registry)
    first = pushed(hub, registry)
    hub.requests.clear()

    again = pushed(hub, registry)

    assert again == type(first)(first.repo_id, first.commit, first.tag, first.url, True)
    assert (hub.lfs_bytes, hub.calls("POST", "/commit/"), hub.calls("POST", "/tag/")) == (0, [], [])
    assert len(hub.requests) <= 6


def test_second_version_is_a_second_commit_and_tag(hub: HubServer, registry: Registry) -> None:
    """Each version has its own commit and tag, on top of the one before, in at most 13 calls: three read the card."""
    publish(registry)
    first = pushed(hub, registry)
    publish(registry, seed=1)
    hub.requests.clear()

    second = pushed(hub, registry)

    repo = hub.repos[REPO]
    assert repo.tags == {"v1": first.commit, "v2": second.commit}
    assert repo.commits[second.commit].parent == first.commit
    assert len(hub.requests) <= 13


def test_same_weights_with_another_lineage_send_no_weights(hub: HubServer, registry: Registry) -> None:
    """A version that differs in its lineage alone is a commit without weights."""
    publish(registry)
    pushed(hub, registry)
    publish(registry, seed=0, task="other")
    hub.requests.clear()

    assert pushed(hub, registry).tag == "v2"
    assert hub.lfs_bytes == 0


def test_tag_that_is_another_version_is_not_moved(hub: HubServer, registry: Registry) -> None:
    """A tag that exists for other content is an error and nothing is committed."""
    publish(registry)
    publish(registry, "other", seed=9)
    pushed(hub, registry)
    hub.requests.clear()

    with pytest.raises(InUse, match="has a tag v1 that is not other@1"):
        pushed(hub, registry, "other")
    assert hub.calls("POST", "/commit/") == []


def test_push_after_a_lost_tag_only_tags(hub: HubServer, registry: Registry) -> None:
    """A push that stopped between commit and tag is finished by pushing again."""
    publish(registry)
    first = pushed(hub, registry)
    hub.repos[REPO].tags.clear()
    hub.requests.clear()

    again = pushed(hub, registry)

    assert (again.commit, again.unchanged) == (first.commit, True)
    assert hub.repos[REPO].tags == {"v1": first.commit}
    assert hub.calls("POST", "/commit/") == []


def test_weights_replaced_behind_the_manifest_are_pushed_again(hub: HubServer, registry: Registry) -> None:
    """A manifest alone does not count as being there: weights that were replaced are noticed."""
    publish(registry)
    pushed(hub, registry)
    repo = hub.repos[REPO]
    repo.commit({WEIGHTS: b"something else"})
    repo.tags.clear()

    assert not pushed(hub, registry).unchanged
    assert repo.files("v1")[WEIGHTS] != b"something else"


def commit_behind_our_back(hub: HubServer, changes: dict[str, bytes | None]) -> None:
    """Have someone else commit just before our commit arrives, once."""

    def before(method: str, path: str) -> None:
        if "/commit/" in path:
            hub.before = None
            hub.repos[REPO].commit(changes, "someone else's")

    hub.before = before


def test_commit_of_someone_else_is_built_upon(hub: HubServer, registry: Registry) -> None:
    """When another file changed meanwhile (412), the push is repeated on the new head and sends no weights twice."""
    version = publish(registry)
    commit_behind_our_back(hub, {"notes.txt": b"hello"})

    result = pushed(hub, registry)

    repo = hub.repos[REPO]
    assert [request.status for request in hub.calls("POST", "/commit/")] == [412, 200]
    assert repo.files("v1")["notes.txt"] == b"hello"
    assert repo.tags == {"v1": result.commit}
    assert hub.lfs_bytes == (version.path / WEIGHTS).stat().st_size


def test_someone_elses_change_of_our_files_is_not_overwritten(hub: HubServer, registry: Registry) -> None:
    """When the adapter's own files changed meanwhile, the push stops."""
    publish(registry)
    commit_behind_our_back(hub, {CONFIG: b"{}"})

    with pytest.raises(InUse, match="someone else is changing the adapter"):
        pushed(hub, registry)
    assert hub.repos[REPO].tags == {}


def test_commit_whose_answer_was_lost_is_recognised(hub: HubServer, registry: Registry) -> None:
    """If the connection breaks after the commit was made, it is found by its manifest and not made twice."""
    publish(registry)
    hub.disturb("/commit/", "lose")

    result = pushed(hub, registry)

    assert len(hub.calls("POST", "/commit/")) == 1
    assert hub.repos[REPO].tags == {"v1": result.commit}
    assert not result.unchanged


def test_writing_needs_no_right_to_create(hub: HubServer, registry: Registry) -> None:
    """A token that may write to a repository but not create one can push to it, and is told so where there is none."""
    publish(registry)
    hub.may_create = False
    with pytest.raises(HubError, match=r"403 \(.*rights.*\): the token may not do this"):
        pushed(hub, registry)

    hub.repos[REPO] = repo = Repo()
    repo.commit({".gitattributes": b""})

    assert pushed(hub, registry).commit == repo.tags["v1"]


def test_two_pushes_at_once_make_one_commit(hub: HubServer, registry: Registry) -> None:
    """Pushing the same version from two places at the same time gives one commit and one tag, and both succeed."""
    publish(registry)
    with ThreadPoolExecutor(2) as pool:
        results = [future.result() for future in [pool.submit(pushed, hub, registry) for _ in range(2)]]

    repo = hub.repos[REPO]
    assert {result.commit for result in results} == {repo.tags["v1"]}
    assert [commit.message for commit in repo.commits.values()] == ["initial commit", "Add sentiment@1"]


def test_large_weights_go_in_parts(registry: Registry) -> None:
    """Weights above the Hub's limit are sent in parts and arrive whole."""
    version = publish(registry)
    with HubServer(multipart_above=1000) as hub:
        pushed(hub, registry)

        assert len(hub.calls("PUT")) > 1
        assert hub.repos[REPO].files("v1")[WEIGHTS] == (version.path / WEIGHTS).read_bytes()


def test_private_is_private_or_refused(hub: HubServer, registry: Registry) -> None:
    """--private makes a private repository, and does not push to a public one that exists."""
    publish(registry)
    pushed(hub, registry, private=True)
    assert hub.repos[REPO].private

    hub.repos[REPO].private = False
    with pytest.raises(InUse, match="exists and is public"):
        pushed(hub, registry, private=True)


def test_push_without_a_good_token_says_how_to_log_in(hub: HubServer, registry: Registry, monkeypatch) -> None:
    """No token: nothing is asked of the Hub. A wrong one: the Hub's refusal, with the way out."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    publish(registry)

    with pytest.raises(HubError, match=r"needs a token.*hf auth login"):
        push(registry, "sentiment", REPO, endpoint=hub.endpoint)
    assert hub.requests == []
    with pytest.raises(HubError, match=r"refused me/sentiment-lora with 401.*hf auth login"):
        push(registry, "sentiment", REPO, token="hf_wrong", endpoint=hub.endpoint)


@pytest.mark.parametrize("act", [pushed, pulled, lambda hub, _: search_hub("sql", endpoint=hub.endpoint)])
@pytest.mark.parametrize("endpoint", [None, "http://hub.invalid"])
def test_hub_that_cannot_be_reached_is_told_at_once(
    registry: Registry, act, endpoint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody listens, or the host has no address, a HubError names it without waiting to try again."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with HubServer() as hub:
        pass
    hub.endpoint = endpoint or hub.endpoint
    publish(registry)

    with pytest.raises(HubError, match=f"the Hub at {hub.endpoint} did not answer"):
        act(hub, registry)
    assert waits == []


def test_hub_behind_a_proxy_needs_no_address(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a proxy set it is the proxy that must find the Hub: the name need not resolve here."""
    monkeypatch.setenv("http_proxy", hub.endpoint)
    close_session()  # the client reads the environment when it is made

    try:
        assert search_hub("sql", endpoint="http://hub.invalid") == []
    finally:
        close_session()
    assert hub.requests


def test_hub_that_is_overloaded_for_a_moment_is_asked_again(hub: HubServer, registry: Registry) -> None:
    """A 503 during a download is tried again by itself."""
    publish(registry)
    pushed(hub, registry)
    hub.disturb("/resolve/", 503)

    assert pulled(hub, registry, name="copy").version.number == 1


def test_base_must_be_known_on_the_hub(hub: HubServer, registry: Registry) -> None:
    """A version whose base has no Hub id needs --base-id, and that must be an id, not a path."""
    publish(registry, hub_id=None)

    with pytest.raises(InputError, match="give --base-id ORG/MODEL"):
        pushed(hub, registry)
    for path in ("/models/llama", "./llama", "~/llama", "a/b/c"):
        with pytest.raises(InputError, match="is not the id of a model"):
            pushed(hub, registry, base_id=path)
    assert hub.requests == []


def test_damaged_version_is_not_pushed(hub: HubServer, registry: Registry) -> None:
    """A blob with a flipped bit stops the push before the Hub is asked."""
    version = publish(registry)
    blob = registry.blobs.path(version.files[1].digest)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)

    with pytest.raises(Corrupt, match=r"adapter_model\.safetensors is damaged"):
        pushed(hub, registry)
    assert hub.requests == []


def test_file_names_are_those_of_peft() -> None:
    """The names known here without torch are those the writer uses."""
    assert (packages.WEIGHTS, packages.CONFIG) == (write.WEIGHTS, write.CONFIG)


def run_qhub(hub: HubServer, home: Home, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, whose Hub is `hub`."""
    environment = {
        **os.environ,
        "QHUB_HOME": str(home.root),
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(home.root.parent / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", "from adapterhub_local.cli.main import run; run()"]
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_command_line_pushes_and_pulls(hub: HubServer, registry: Registry, home: Home) -> None:
    """`qhub push` and `qhub pull` print where the version went and came from, errors are one line."""
    version = publish(registry)

    push_result = run_qhub(hub, home, "push", "sentiment@1", REPO, "--json")
    pull_result = run_qhub(hub, home, "pull", f"{REPO}@v1", "--name", "copy")
    failure = run_qhub(hub, home, "pull", f"{REPO}@v9")

    assert (push_result.returncode, push_result.stderr) == (0, "")
    assert json.loads(push_result.stdout)["commit"] == hub.repos[REPO].tags["v1"]
    assert pull_result.returncode == 0
    assert pull_result.stdout.startswith("copy@1 pulled: me/sentiment-lora at ")
    assert f"its base {BASE} is not among the bases here: add it with `qhub base add" in pull_result.stderr
    assert registry.resolve("copy").content_digest == version.content_digest
    assert (failure.returncode, len(failure.stderr.splitlines())) == (2, 1)
    assert "has no revision 'v9'" in failure.stderr
    assert not (home.root.parent / "hf" / "hub").exists()  # no second copy in the Hub's own cache


def test_push_does_not_load_torch() -> None:
    """Pushing moves files and digests: torch is not loaded for it."""
    code = "import sys, adapterhub_local.hub; assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


def test_a_base_from_the_hub(hub: HubServer, home: Home, tiny_folder: Path) -> None:
    """`qhub base add` takes a Hub id with a revision, records both, its licence and that it is private, and fetches
    neither pickles nor code.
    """
    files = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    hub.repos["org/tiny"] = repo = Repo(private=True)
    files["README.md"] = b"---\nlicense: apache-2.0\n---\n"
    commit = repo.commit({**files, "pytorch_model.bin": b"pickle", "modeling.py": b"raise SystemExit"})
    repo.commit({"config.json": b"{}"})

    added = run_qhub(hub, home, "base", "add", "tiny", f"org/tiny@{commit}", "--json")
    missing = run_qhub(hub, home, "base", "add", "other", "org/absent")

    assert (added.returncode, added.stderr) == (0, "")
    assert (json.loads(added.stdout)["hub_id"], json.loads(added.stdout)["revision"]) == ("org/tiny", commit)
    assert not [call for call in hub.calls(part="resolve") if call.path.endswith((".bin", ".py"))]
    lineage = find_base("tiny", home).lineage()
    assert (lineage["license"], lineage["private"]) == ("apache-2.0", True)
    assert (missing.returncode, len(missing.stderr.splitlines())) == (2, 1)
    assert "org/absent" in missing.stderr
