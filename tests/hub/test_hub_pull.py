"""What is pulled from a Hub over real HTTP on loopback: what was pushed, what others made, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapterhub_local.durable import digest_bytes
from adapterhub_local.errors import (
    BadFile,
    BadReference,
    Corrupt,
    InputError,
    NotFound,
)
from adapterhub_local.hub import pull, push
from adapterhub_local.hub.package import CARD, MANIFEST
from adapterhub_local.lora import write
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.hub_adapters import BASE, LINEAGE, MODULES, REPO, is_untouched, peft_files, publish, pulled, pushed, tensors
from tests.hub_server import HubServer, Repo


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

    push(registry, "dora", "me/again", base_id=BASE, token=hub.token, endpoint=hub.endpoint)
    assert b"vLLM does not read this adapter as it is: it has DoRA" in hub.repos["me/again"].files()[CARD]
    again = pull(registry, "me/again", name="again", token=hub.token, endpoint=hub.endpoint).version
    assert again.content_digest == version.content_digest


def test_rows_of_tokens_are_pulled_whole(hub: HubServer, registry: Registry, tmp_path: Path) -> None:
    """The rows of embeddings that PEFT keeps with an adapter come along with its factors, and go out again."""
    files = peft_files(tmp_path / "peft", trainable_token_indices=[7, 3])
    folder = tmp_path / "tokens"
    folder.mkdir()
    name, rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.rand(2, 64)
    save_file({**tensors(3), name: rows}, folder / WEIGHTS, metadata={"format": "pt"})
    hub.repos[REPO] = repo = Repo()
    repo.commit({**files, WEIGHTS: (folder / WEIGHTS).read_bytes()})

    version = pulled(hub, registry, name="tokens").version

    here = open_adapter(version.path, tokens=True)
    assert torch.equal(here.rows("model.embed_tokens"), rows)
    assert here.tokens["model.embed_tokens"].ids == (7, 3)
    assert version.lineage["adapter"]["tokens"] == 2
    push(registry, "tokens", "me/again", base_id=BASE, token=hub.token, endpoint=hub.endpoint)
    card = hub.repos["me/again"].files()[CARD]
    assert b"vLLM does not read this adapter as it is: it has DoRA or rows of embeddings" in card
    again = pull(registry, "me/again", name="again", token=hub.token, endpoint=hub.endpoint).version
    assert again.content_digest == version.content_digest


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


@pytest.mark.parametrize(
    "part",
    [{"task": "a\x1b[31m"}, {"kind": "a\rb"}, {"description": "\x9b2J"}, {"base": {**LINEAGE["base"], "name": "a\nb"}},
     {"data": [{"role": "train", "file": "\x1b]0;x\x07", "rows": 1, "digest": "x"}]},
     {"data": [{"role": "train", "file": "a", "digest": "x"}]},
     {"data": [{"role": "t", "file": "a", "rows": 1, "digest": 7}]},
     {"parents": [{"reference": "\x1b[2J", "weight": 1.0}]}, {"parents": [{"reference": "a"}]},
     {"parents": [{"reference": "a", "weight": 10**400}]}, {"adapter": {"rank": 2, "alpha": 10**400}},
     {"metrics": {"t": {"adapter": {"\x1b": 1.0}}}}, {"compatibility": "exact"}, {"merge": {"method": 5}}],
    ids=str,
)  # fmt: skip
def test_a_lineage_that_import_refuses_is_refused_here_too(
    hub: HubServer, registry: Registry, home: Home, part: dict
) -> None:
    """What is pulled has its lineage checked as what is imported: control characters and other forms stay outside."""
    publish(registry, **part)
    with pytest.MonkeyPatch.context() as patch:  # the hostile pusher's own model card says nothing
        patch.setattr("adapterhub_local.hub.package.card", lambda *arguments, **options: "---\nlicense: mit\n---\n")
        pushed(hub, registry)
    other = Registry(Home(home.root.parent / "other"))

    with pytest.raises(Corrupt, match="its lineage has another form") as caught:
        pulled(hub, other)

    assert str(caught.value).isprintable()
    assert is_untouched(other)
