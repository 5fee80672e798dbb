"""Push and pull over real HTTP against a Hub on loopback."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from adapterhub_local.base.store import find_base
from adapterhub_local.durable import digest_bytes
from adapterhub_local.errors import (
    BadFile,
    BadReference,
    Corrupt,
    HubError,
    Incompatible,
    InputError,
    InUse,
    NotFound,
)
from adapterhub_local.hub import package as packages
from adapterhub_local.hub import pull, push
from adapterhub_local.hub.package import CARD, MANIFEST
from adapterhub_local.hub.scrub import machine_roots, without_paths
from adapterhub_local.lora import write
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.hub_adapters import BASE, LINEAGE, MODULES, REPO, is_untouched, peft_files, publish, pulled, pushed, tensors
from tests.hub_server import HubServer, Repo


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
    """Each version has its own commit and tag, on top of the one before, in at most 10 calls."""
    publish(registry)
    first = pushed(hub, registry)
    publish(registry, seed=1)
    hub.requests.clear()

    second = pushed(hub, registry)

    repo = hub.repos[REPO]
    assert repo.tags == {"v1": first.commit, "v2": second.commit}
    assert repo.commits[second.commit].parent == first.commit
    assert len(hub.requests) <= 10


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


def test_round_trip_restores_the_version(hub: HubServer, registry: Registry) -> None:
    """Push, wipe the home, pull: the same content digest and lineage, and the adapter opens."""
    version = publish(registry)
    pushed(hub, registry)
    shutil.rmtree(registry.home.root)
    fresh = Registry(registry.home)

    result = pulled(hub, fresh, revision="v1", name="sentiment")

    assert result.version.content_digest == version.content_digest
    weights = next(file.digest for file in version.files if file.path == WEIGHTS)
    origin = {"repo_id": REPO, "commit": result.commit, "weights": weights, "manifest_digest": version.manifest_digest}
    assert result.version.lineage == {**LINEAGE, "pulled_from": origin}
    assert (str(result.version), result.is_new, result.is_verified) == ("sentiment@1", True, True)
    assert open_adapter(result.version.path).modules == MODULES
    assert list(fresh.home.tmp.iterdir()) == []
    assert result.version.lineage == fresh.resolve("sentiment").lineage


def test_round_trip_restores_a_config_without_a_hub_id(hub: HubServer, registry: Registry) -> None:
    """--base-id goes into the pushed config and card only; what comes back has the digest it had."""
    version = publish(registry, hub_id=None)
    pushed(hub, registry, base_id="org/other")
    config = json.loads(hub.repos[REPO].files()[CONFIG])
    shutil.rmtree(registry.home.root)

    result = pulled(hub, Registry(registry.home))

    assert config["base_model_name_or_path"] == "org/other"
    assert result.version.content_digest == version.content_digest
    assert open_adapter(result.version.path).config.base_model is None
    assert result.version.name == "sentiment-lora"


def test_pull_of_what_is_here_registers_nothing(hub: HubServer, registry: Registry) -> None:
    """Pulling a version that was pushed from here, or pulled before, returns the one that is there."""
    version = publish(registry)
    pushed(hub, registry)

    here = pulled(hub, registry, name="sentiment")
    first, second = pulled(hub, registry, name="copy"), pulled(hub, registry, name="copy")

    assert (here.version, here.is_new) == (version, False)
    assert (first.is_new, second.is_new, str(second.version)) == (True, False, "copy@1")


def test_repository_made_with_peft_is_rewritten(hub: HubServer, registry: Registry, tmp_path: Path) -> None:
    """A plain PEFT repository becomes a self-describing version that names its base and where it is from."""
    hub.repos[REPO] = repo = Repo()
    weights = peft_files(tmp_path / "peft")[WEIGHTS]
    repo.commit(peft_files(tmp_path / "again"))

    result = pulled(hub, registry)

    assert not result.is_verified
    assert result.version.lineage == {
        "kind": "pull",
        "base": {"hub_id": BASE},
        "adapter": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"], "num_parameters": 896},
        "pulled_from": {"repo_id": REPO, "commit": repo.branches["main"], "weights": digest_bytes(weights)},
    }
    single = open_adapter(result.version.path / WEIGHTS)  # without the config beside it
    assert (single.config.alpha, single.config.base_model) == (8, BASE)
    for name, tensor in tensors(3).items():
        module, factor = name.removeprefix("base_model.model.").removesuffix(".weight").split(".lora_")
        assert torch.equal(getattr(single.delta(module), factor), tensor)


def test_path_of_the_authors_machine_is_dropped(hub: HubServer, registry: Registry, tmp_path: Path) -> None:
    """A PEFT adapter whose base was a folder comes without a base, not with someone's path."""
    hub.repos[REPO] = repo = Repo()
    repo.commit(peft_files(tmp_path / "peft", base_model_name_or_path="/home/author/llama"))

    version = pulled(hub, registry).version

    assert version.lineage["base"] == {"hub_id": None}
    assert b"author" not in (version.path / CONFIG).read_bytes() + (version.path / WEIGHTS).read_bytes()


def test_base_of_this_home_is_recognised(hub: HubServer, registry: Registry, tiny_base, tmp_path: Path) -> None:
    """The caller learns whether the base is here: by fingerprint, or by Hub id where only that is known."""
    hub.repos[REPO] = repo = Repo()
    repo.commit(peft_files(tmp_path / "peft", base_model_name_or_path=tiny_base.hub_id))
    publish(registry, base=tiny_base.lineage())
    push(registry, "sentiment", "me/ours", token=hub.token, endpoint=hub.endpoint)
    publish(registry, "stranger")
    push(registry, "stranger", "me/stranger", token=hub.token, endpoint=hub.endpoint)

    by_id = pulled(hub, registry)
    ours, stranger = (pull(registry, f"me/{name}", endpoint=hub.endpoint) for name in ("ours", "stranger"))

    assert (by_id.base, by_id.version.base_fingerprint) == ("tiny", tiny_base.fingerprint)
    assert (ours.base, ours.base_known) == ("tiny", True)
    assert (stranger.base, stranger.base_known) == (None, False)


@pytest.mark.parametrize("path", [WEIGHTS, CONFIG])
def test_changed_file_is_refused(hub: HubServer, registry: Registry, home: Home, path: str) -> None:
    """A repository whose bytes are not what its manifest says registers nothing and leaves nothing."""
    publish(registry)
    pushed(hub, registry)
    shutil.rmtree(home.root)
    content = bytearray(hub.repos[REPO].files()[path])
    content[-3] ^= 1
    hub.repos[REPO].commit({path: bytes(content)})

    with pytest.raises(Corrupt, match=f"{path} of {REPO}@.* is not what its qhub-manifest.json says"):
        pulled(hub, Registry(home))
    assert is_untouched(Registry(home))


@pytest.mark.parametrize(
    "change",
    [
        {"manifest": {}},
        {"manifest_digest": "sha256:" + "0" * 64},
        {"lineage": {"base": {"fingerprint": 7}}},
        {"lineage": {"metrics": 5}, "shortened": ["metrics"]},
        {"lineage": {"data": ["x"]}, "shortened": ["data"]},
        {"lineage": {"kind": "forged"}},
        {"files": []},
        {"adapter_config": "{}"},
        {"format": 99},
    ],
    ids=lambda change: next(iter(change)),
)
def test_forged_manifest_is_refused(hub: HubServer, registry: Registry, home: Home, change: dict) -> None:
    """A manifest that was edited does not pass: it must agree with itself and with the files."""
    publish(registry)
    pushed(hub, registry)
    shutil.rmtree(home.root)
    fields = json.loads(hub.repos[REPO].files()[MANIFEST]) | change
    hub.repos[REPO].commit({MANIFEST: json.dumps(fields).encode()})

    with pytest.raises(Corrupt, match=MANIFEST):
        pulled(hub, Registry(home))
    assert is_untouched(Registry(home))


def test_manifest_that_is_not_json_is_refused(hub: HubServer, registry: Registry, tmp_path: Path) -> None:
    """Whatever stands in place of the manifest is an error with one sentence."""
    hub.repos[REPO] = repo = Repo()
    files = peft_files(tmp_path / "peft")
    for content in (b"", b"[]", b'{"format": NaN}', b"[" * 100_000, b"\xff"):
        repo.commit({**files, MANIFEST: content})
        with pytest.raises(Corrupt, match="cannot be read"):
            pulled(hub, registry)
    assert is_untouched(registry)


def test_dora_is_pulled_whole(hub: HubServer, registry: Registry, tmp_path: Path) -> None:
    """The lengths of DoRA come along with its factors."""
    files = peft_files(tmp_path / "peft", use_dora=True)
    folder = tmp_path / "dora"
    folder.mkdir()
    lengths = {write.tensor_name(module, "A"): rows for module, rows in zip(MODULES, (64, 32), strict=True)}
    lengths = {name.replace("lora_A.weight", "lora_magnitude_vector"): torch.rand(n) for name, n in lengths.items()}
    save_file({**tensors(3), **lengths}, folder / WEIGHTS, metadata={"format": "pt"})
    hub.repos[REPO] = repo = Repo()
    repo.commit({**files, WEIGHTS: (folder / WEIGHTS).read_bytes()})

    version = pulled(hub, registry, name="dora").version

    (folder / CONFIG).write_bytes(files[CONFIG])
    there, here = (open_adapter(path, dora=True) for path in (folder, version.path))
    assert here.config.use_dora
    for module, delta in there.deltas():
        assert torch.equal(here.magnitude(module), there.magnitude(module))
        assert torch.equal(here.delta(module).A, delta.A)


def test_what_is_no_adapter_is_refused(hub: HubServer, registry: Registry, tmp_path: Path) -> None:
    """Repositories without an adapter, with a pickle, or with what we do not support are refused with the reason."""
    hub.repos[REPO] = repo = Repo()
    peft = peft_files(tmp_path / "peft")
    dora = peft_files(tmp_path / "dora", use_dora=True)
    cases = {
        "it has no adapter_model.safetensors and no adapter_config.json": {"config.json": b"{}"},
        "it has no adapter_config.json": {WEIGHTS: peft[WEIGHTS]},
        "a pickle, which can run code": {"adapter_model.bin": b"\x80", CONFIG: peft[CONFIG]},
        f"^{REPO}@.{{12}}/{WEIGHTS}: its config sets use_dora": dora,
        f"^{REPO}@.{{12}}/{WEIGHTS} is not a safetensors file": {**peft, WEIGHTS: b"\x80\x04pickle"},
        "needs that many": {**peft, CONFIG: b" " * (17 << 20)},
    }
    for reason, files in cases.items():
        repo.commit({**dict.fromkeys((WEIGHTS, CONFIG, "config.json", "adapter_model.bin")), **files})
        with pytest.raises(BadFile, match=reason):
            pulled(hub, registry)
    assert is_untouched(registry)


def test_numbers_that_are_not_finite_are_refused(hub: HubServer, registry: Registry, tmp_path: Path) -> None:
    """An adapter with NaN in it is not registered, whoever made it."""
    hub.repos[REPO] = repo = Repo()
    files = peft_files(tmp_path / "peft")
    broken = tensors(3)
    broken[next(iter(broken))][0, 0] = float("nan")
    save_file(broken, tmp_path / "nan.safetensors")
    repo.commit({**files, WEIGHTS: (tmp_path / "nan.safetensors").read_bytes()})

    with pytest.raises(BadFile, match="NaN or infinity"):
        pulled(hub, registry)
    assert is_untouched(registry)


def test_what_is_not_there_is_said(hub: HubServer, registry: Registry) -> None:
    """A missing repository, revision or version, and a name that cannot be used, each have their sentence."""
    with pytest.raises(NotFound, match="there is no repository me/sentiment-lora"):
        pulled(hub, registry)
    publish(registry)
    pushed(hub, registry)
    with pytest.raises(NotFound, match="has no revision 'v7'"):
        pulled(hub, registry, revision="v7")
    with pytest.raises(NotFound, match="did you mean sentiment"):
        pushed(hub, registry, "sentimental")
    with pytest.raises(BadReference, match="give --name"):
        pull(registry, "me/x_", endpoint=hub.endpoint)
    for wrong in ("sentiment", "a/b/c", "../x", "me/", "http://x/me/y", ""):
        with pytest.raises(InputError, match="write ORG/REPO"):
            push(registry, "sentiment", wrong, token=hub.token, endpoint=hub.endpoint)


def test_private_repository_needs_the_token(hub: HubServer, registry: Registry, monkeypatch) -> None:
    """Without a token a private repository is as good as missing, and the message says how to log in."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    publish(registry)
    pushed(hub, registry, private=True)

    with pytest.raises(NotFound, match=r"that you may see.*hf auth login"):
        pull(registry, REPO, endpoint=hub.endpoint)


def test_push_without_a_good_token_says_how_to_log_in(hub: HubServer, registry: Registry, monkeypatch) -> None:
    """No token: nothing is asked of the Hub. A wrong one: the Hub's refusal, with the way out."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    publish(registry)

    with pytest.raises(HubError, match=r"needs a token.*hf auth login"):
        push(registry, "sentiment", REPO, endpoint=hub.endpoint)
    assert hub.requests == []
    with pytest.raises(HubError, match=r"refused me/sentiment-lora with 401.*hf auth login"):
        push(registry, "sentiment", REPO, token="hf_wrong", endpoint=hub.endpoint)


@pytest.mark.parametrize("act", [pushed, pulled])
def test_hub_that_does_not_answer_is_one_sentence(registry: Registry, act) -> None:
    """A Hub that is down is a HubError with its address, for push and pull."""
    with HubServer() as hub:
        pass
    publish(registry)

    with pytest.raises(HubError, match=f"the Hub at {hub.endpoint} did not answer"):
        act(hub, registry)


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


def test_no_path_of_this_machine_is_published(hub: HubServer, registry: Registry, home: Home) -> None:
    """Paths in recipe and lineage are cut short in every pushed file, the manifest says where, and it pulls."""
    here = [str(home.root), str(Path.cwd()), str(Path.home())]
    text = f'data = "{home.root}/data/train.jsonl"\nother = "{Path.cwd()}/x"\nthird = "/srv/secret/y.jsonl"\n'
    version = publish(registry, recipe={"text": text}, data=[{"role": "train", "file": f"{Path.home()}/d/train.jsonl"}])
    pushed(hub, registry)

    everything = b"".join(hub.repos[REPO].files().values())
    assert [path for path in [*here, "/srv/secret"] if path.encode() in everything] == []
    fields = json.loads(hub.repos[REPO].files()[MANIFEST])
    assert fields["shortened"] == ["data[0].file", "recipe.text"]
    assert fields["lineage"]["recipe"]["text"] == 'data = "data/train.jsonl"\nother = "x"\nthird = "y.jsonl"\n'
    assert pulled(hub, registry).version.content_digest == version.content_digest


def test_path_inside_the_weights_stops_the_push(hub: HubServer, registry: Registry, home: Home) -> None:
    """The weights are pushed as they are, so a path of this machine in their header is refused."""
    publish(registry, hub_id=f"{home.root}/bases/tiny")

    with pytest.raises(Incompatible, match="a folder of this machine"):
        pushed(hub, registry, base_id=BASE)
    assert hub.requests == []


def test_paths_are_told_from_what_looks_like_them(tmp_path: Path) -> None:
    """Hub ids, URLs, relative paths and prose with slashes stay; absolute paths do not."""
    kept = ["org/model", "https://host/a/b.html", "./data/x", "../up/x", "and/or", "1/2/3", "/nothink", "s3://b/k/x"]
    cut = {"/srv/a/b.jsonl": "b.jsonl", "~/x/y": "y", "file:///srv/a/b": "b", r"C:\\Users\\me\\x": "x"}

    value, places = without_paths({"kept": kept, "cut": list(cut)}, machine_roots(tmp_path))

    assert value == {"kept": kept, "cut": list(cut.values())}
    assert places == [f"cut[{index}]" for index in range(len(cut))]


def test_card_is_read_by_the_hubs_own_parser(hub: HubServer, registry: Registry) -> None:
    """The model card has the base, tags and measured results as data, and tables and a recipe for people."""
    revision = "12" * 20
    publish(registry, base={**LINEAGE["base"], "revision": revision})
    pushed(hub, registry)

    text = hub.repos[REPO].files()[CARD].decode()
    data = ModelCard(text).data

    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", BASE, "text-generation")
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.tags == ["lora", "qlora", "qhub"]
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"loss": 0.5, "exact_match": 0.875}
    assert "| sentiment | exact_match | 0.25 [0.112\N{EN DASH}0.469] | 0.875 [0.669\N{EN DASH}0.960] | 20 |" in text
    assert "sentiment\\|train.jsonl" in text
    assert "````toml" in text
    assert "| Target modules | `q_proj`, `v_proj` |" in text
    assert f'from_pretrained("{BASE}", revision="{revision}", quantization_config=nf4)' in text
    assert f"qhub pull {REPO}@v1" in text


def test_card_of_a_merge_names_parents_and_weights(hub: HubServer, registry: Registry) -> None:
    """A merged version lists what it was merged from, and by which method."""
    parents = [{"reference": "a@1", "content_digest": "sha256:aa", "weight": 0.7}, {"reference": "b@2", "weight": -0.3}]
    publish(registry, kind="merge", parents=parents, merge={"method": "weighted_sum", "rank": 8}, metrics={})
    pushed(hub, registry)

    text = hub.repos[REPO].files()[CARD].decode()

    assert "| a@1 | 0.7 | `sha256:aa` |" in text
    assert "| b@2 | -0.3 |" in text
    assert "- method: weighted_sum" in text
    assert "merge" in ModelCard(text).data.tags


def test_card_of_a_bare_lineage_is_valid(hub: HubServer, registry: Registry) -> None:
    """Nothing in the lineage is needed but a base, which may be given."""
    version = publish(registry)
    registry.publish("bare", {file.path: version.path / file.path for file in version.files}, {})

    push(registry, "bare", REPO, base_id=BASE, token=hub.token, endpoint=hub.endpoint)

    assert ModelCard(hub.repos[REPO].files()[CARD].decode()).data.base_model == BASE


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

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


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
