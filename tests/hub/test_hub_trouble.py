"""Push and pull while networks break, processes die, others push too and servers lie: one clean result, or none."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from adapterhub_local.errors import BadFile, Corrupt, HubError, QhubError
from adapterhub_local.hub import commits, push
from adapterhub_local.hub.package import MANIFEST
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.hub_adapters import REPO, is_untouched, peft_files, publish, pulled, pushed
from tests.hub_pusher import push_from
from tests.hub_server import HubServer, Repo

CALLS = 10  # of a first push with one branch


@pytest.fixture(scope="module")
def processes():
    """A server that forks processes which have the Hub's client loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.hub_pusher"])
    return context


def kill_at(hub: HubServer, number: int, process: multiprocessing.Process, *, after_work: bool) -> None:
    """Kill the process with its request `number`, which the server has then done or never got."""
    seen = []

    def before(method: str, path: str) -> bool | None:
        seen.append(path)
        if len(seen) != number:
            return None
        os.kill(process.pid, signal.SIGKILL)
        return after_work

    hub.before = before


@pytest.mark.parametrize("after_work", [False, True])
@pytest.mark.parametrize("number", range(1, CALLS + 1))
def test_push_killed_at_any_call_is_finished_by_pushing_again(
    hub: HubServer, registry: Registry, processes, number: int, after_work: bool
) -> None:
    """A push that dies at any of its calls, run again, ends as one commit, one tag and one branch."""
    version = publish(registry)
    arguments = (str(registry.home.root), REPO, hub.token, hub.endpoint)
    process = processes.Process(target=push_from, args=arguments)
    kill_at(hub, number, process, after_work=after_work)
    process.start()
    process.join(60)
    hub.before = None
    assert process.exitcode == -signal.SIGKILL

    result = pushed(hub, registry, aliases=["prod"])

    repo = hub.repos[REPO]
    assert [commit.message for commit in repo.commits.values()] == ["initial commit", "Add sentiment@1"]
    assert repo.tags == {"v1": result.commit}
    assert repo.branches == {"main": result.commit, "prod": result.commit}
    assert repo.files()[WEIGHTS] == (version.path / WEIGHTS).read_bytes()
    assert registry.home.tmp.exists()


def test_push_with_a_branch_has_as_many_calls_as_are_killed(hub: HubServer, registry: Registry) -> None:
    """The test above goes through every call there is."""
    publish(registry)
    pushed(hub, registry, aliases=["prod"])

    assert len(hub.requests) == CALLS


@pytest.mark.parametrize("part", ["/api/repos/create", "/refs", "/preupload/", "objects/batch", "/commit/", "/tag/"])
@pytest.mark.parametrize("kind", ["drop", "lose"])
def test_broken_connection_is_finished_by_pushing_again(
    hub: HubServer, registry: Registry, part: str, kind: str
) -> None:
    """Whichever answer the network swallows, pushing (again) ends with one commit and one tag."""
    publish(registry)
    hub.disturb(part, kind)
    try:
        pushed(hub, registry)
    except HubError as error:
        assert "did not answer" in str(error)  # noqa: PT017

    result = pushed(hub, registry)

    repo = hub.repos[REPO]
    assert repo.tags == {"v1": result.commit}
    assert len(repo.commits) == 2


def test_two_versions_pushed_at_once_are_both_there(hub: HubServer, registry: Registry) -> None:
    """Two versions committed on the same head at the same moment: each has its commit and its tag, none is lost."""
    first, second = publish(registry), publish(registry, seed=1)
    hub.repos[REPO] = repo = Repo()
    repo.commit({".gitattributes": b""})
    meeting = Barrier(2, timeout=20)

    def before(method: str, path: str) -> None:
        if "/commit/" in path and len(hub.calls("POST", "/commit/")) == 0:
            meeting.wait()

    hub.before = before
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda version: pushed(hub, registry, str(version)), (first, second)))

    assert sorted(repo.tags) == ["v1", "v2"]
    assert sorted(request.status for request in hub.calls("POST", "/commit/")) == [200, 200, 412]
    for version in (first, second):
        assert repo.files(f"v{version.number}")[WEIGHTS] == (version.path / WEIGHTS).read_bytes()
    assert len(repo.commits) == 3


def test_weights_uploaded_by_a_push_that_failed_are_not_sent_again(hub: HubServer, registry: Registry) -> None:
    """Blobs go before the commit, so a commit that was refused costs no second upload."""
    version = publish(registry)
    hub.disturb("/commit/", 400)
    with pytest.raises(HubError, match="with 400"):
        pushed(hub, registry)

    pushed(hub, registry)

    assert hub.lfs_bytes == (version.path / WEIGHTS).stat().st_size


def test_rate_limits_are_waited_out(hub: HubServer, registry: Registry) -> None:
    """429 for an upload, or for the commit, is tried again."""
    publish(registry)
    hub.disturb("/lfs/", 429)
    pushed(hub, registry)

    publish(registry, seed=1)
    hub.disturb("/commit/", 429)
    assert pushed(hub, registry).tag == "v2"


def test_pull_survives_slow_and_broken_downloads(hub: HubServer, registry: Registry, home: Home) -> None:
    """A body that comes in pieces is put together; one that breaks off in the middle is fetched again."""
    version = publish(registry)
    commit = pushed(hub, registry).commit
    shutil.rmtree(home.root)
    hub.disturb(f"/resolve/{commit}/{MANIFEST}", "slow", 2)  # HEAD and GET
    hub.disturb(f"/resolve/{commit}/{WEIGHTS}", "cut", 2)

    result = pulled(hub, Registry(home))

    assert result.version.content_digest == version.content_digest
    assert len(hub.calls("GET", f"/resolve/{commit}/{WEIGHTS}")) == 2


def test_renamed_repositories_and_files_on_another_host_are_followed(
    hub: HubServer, registry: Registry, home: Home
) -> None:
    """A repository that was renamed answers under its old name, and large files may come from another host."""
    version = publish(registry)
    pushed(hub, registry)
    shutil.rmtree(home.root)
    hub.repos["me/renamed"] = hub.repos.pop(REPO)
    hub.renamed[REPO] = "me/renamed"
    hub.large_files_elsewhere = True

    result = pulled(hub, Registry(home), name="sentiment")

    assert result.version.content_digest == version.content_digest
    assert len(hub.calls("GET", "/large/")) == 1


def test_file_damaged_on_the_way_registers_nothing(hub: HubServer, registry: Registry, tmp_path: Path) -> None:
    """A plain PEFT repository has no manifest, so the weights are held against the sha256 that the Hub lists."""
    hub.repos[REPO] = repo = Repo()
    repo.commit(peft_files(tmp_path / "peft"))
    hub.disturb(f"/{WEIGHTS}", "flip", 100)

    with pytest.raises(Corrupt, match=f"{WEIGHTS} of {REPO}@.* was damaged on the way"):
        pulled(hub, registry)
    assert is_untouched(registry)


def test_sizes_that_are_lies_are_noticed(hub: HubServer, registry: Registry, tmp_path: Path) -> None:
    """Weights said to be larger than the disk are not downloaded; 5 GB that turn out otherwise are not registered."""
    hub.repos[REPO] = repo = Repo()
    files = peft_files(tmp_path / "peft")
    repo.commit(files)
    repo.claimed_sizes[WEIGHTS] = 10**16
    with pytest.raises(QhubError, match=r"needs 20,000,000\.0 GB while it is pulled"):
        pulled(hub, registry)
    assert hub.calls("GET", "/resolve/") == []

    repo.claimed_sizes[WEIGHTS] = 5 * 10**9
    shutil_free = shutil.disk_usage(tmp_path).free
    reason = "the Hub lists 5,000,000,000" if shutil_free > 10**10 else "GB while it is pulled"
    with pytest.raises(QhubError, match=reason):
        pulled(hub, registry)
    repo.claimed_sizes.clear()
    repo.commit({WEIGHTS: (5 * 10**9).to_bytes(8, "little") + files[WEIGHTS][8:]})
    with pytest.raises(BadFile, match="claims 5,000,000,000 bytes"):
        pulled(hub, registry)
    assert is_untouched(registry)


def test_names_that_lead_out_of_the_folder_are_refused(hub: HubServer, registry: Registry, home: Home) -> None:
    """A manifest whose files are called `../x` is refused, and files so listed are never asked for."""
    publish(registry)
    pushed(hub, registry)
    shutil.rmtree(home.root)
    fields = json.loads(hub.repos[REPO].files()[MANIFEST])
    fields["manifest"]["layers"][0]["annotations"]["org.opencontainers.image.title"] = "../../outside"
    hub.repos[REPO].commit({MANIFEST: json.dumps(fields).encode(), "../../escape": b"x"})
    hub.requests.clear()

    with pytest.raises(Corrupt, match="cannot be a file of a version"):
        pulled(hub, Registry(home))
    assert not [request for request in hub.requests if ".." in request.path]
    assert is_untouched(Registry(home))


def test_disk_that_is_full_in_the_middle_registers_nothing(
    hub: HubServer, registry: Registry, home: Home, tmp_path: Path
) -> None:
    """When the disk takes no more while the weights come in, one line says so and nothing is left behind."""
    hub.repos[REPO] = repo = Repo()
    repo.commit(peft_files(tmp_path / "peft"))
    Registry(home).names()  # the database is there
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); import signal;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from adapterhub_local.cli.main import run; run()"
    )
    environment = {**os.environ, "QHUB_HOME": str(home.root), "HF_ENDPOINT": hub.endpoint}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub.token}

    done = subprocess.run(
        [sys.executable, "-c", code, "pull", REPO], env=environment, capture_output=True, text=True, check=False
    )

    assert (done.returncode, len(done.stderr.strip().splitlines())) == (1, 1), done.stderr
    assert "File too large" in done.stderr or "no space left" in done.stderr
    assert is_untouched(Registry(home))


def test_token_without_rights_is_told_and_a_pull_request_needs_none(hub: HubServer, registry: Registry) -> None:
    """Without the right to write nothing is changed; --pr proposes the version, once, and tags nothing."""
    publish(registry)
    hub.repos["them/theirs"] = repo = Repo()
    start = repo.commit({".gitattributes": b""})
    hub.may_write = False
    with pytest.raises(HubError, match=r"403 \(.*rights to write.*\): the token may not do this"):
        push(registry, "sentiment", "them/theirs", token=hub.token, endpoint=hub.endpoint)
    options = {"token": hub.token, "endpoint": hub.endpoint, "pull_request": True}

    first = push(registry, "sentiment", "them/theirs", **options)
    again = push(registry, "sentiment", "them/theirs", **options)

    assert (first.pull_request, first.tag, first.unchanged, again.unchanged) == ("1", None, False, True)
    assert first.url == f"{hub.endpoint}/them/theirs/discussions/1"
    assert repo.branches == {"main": start}
    assert repo.pull_requests == {"refs/pr/1": first.commit}
    assert repo.tags == {}


def test_pull_request_whose_answer_was_lost_is_found(hub: HubServer, registry: Registry) -> None:
    """A pull request that was opened although its answer got lost is not opened twice, and can be pulled."""
    version = publish(registry)
    hub.repos[REPO] = repo = Repo()
    repo.commit({".gitattributes": b""})
    hub.disturb("/commit/", "lose")

    result = pushed(hub, registry, pull_request=True)

    assert (result.pull_request, len(repo.pull_requests)) == ("1", 1)
    theirs = pulled(hub, registry, revision="refs/pr/1", name="theirs")
    assert theirs.version.content_digest == version.content_digest
    assert open_adapter(theirs.version.path).config.rank == 4


def test_attempts_at_a_busy_repository_end(hub: HubServer, registry: Registry) -> None:
    """When others commit every time, the push stops after some attempts and says what to do."""
    publish(registry)
    repo_id = REPO

    def before(method: str, path: str) -> None:
        if "/commit/" in path:
            hub.repos[repo_id].commit({f"{len(hub.requests)}.txt": b"x"}, f"other {len(hub.requests)}")

    hub.before = before

    with pytest.raises(HubError, match=f"changed by others {commits.ATTEMPTS} times"):
        pushed(hub, registry)
    assert hub.repos[REPO].tags == {}
    assert CONFIG not in hub.repos[REPO].files()
