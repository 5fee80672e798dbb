"""What vLLM is given for a name: a version that the name can only ever mean and that vLLM computes, or nothing."""

import asyncio
import importlib.metadata
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from adapterhub_local import vllm
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.registry import Registry
from adapterhub_local.registry.gc import remove
from adapterhub_local.registry.push import push
from adapterhub_local.registry.remotes import add_remote
from adapterhub_local.settings import home as home_at
from tests.patience import PATIENCE
from tests.serve.adapter_makers import publish
from tests.token_adapters import publish as publish_tokens


@dataclass
class LoRARequest:
    """As vLLM's: its number counts from 1, its path is not empty."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        assert self.lora_int_id > 0
        assert self.lora_path


class LoRAResolver:
    """As vLLM's."""


class Resolvers:
    """vLLM's registry of resolvers."""

    def __init__(self) -> None:
        self.resolvers: dict[str, LoRAResolver] = {}

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch):
    """Asks the plugin for a name, as vLLM does that serves a model, once it is registered."""
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver")}
    known = Resolvers()
    modules["vllm.lora.request"].LoRARequest = LoRARequest
    modules["vllm.lora.resolver"].LoRAResolver = LoRAResolver
    modules["vllm.lora.resolver"].LoRAResolverRegistry = known
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    vllm.register()
    vllm.register()  # vLLM may load a plugin more than once
    (resolver,) = known.resolvers.values()
    assert isinstance(resolver, LoRAResolver)
    return lambda model, name: asyncio.run(resolver.resolve_lora(model, name))


def test_a_version_is_what_it_is_called(asked, registry: Registry, tiny_base: BaseInfo) -> None:
    """A number or a whole digest is resolved to the version's files, each content with a number of its own."""
    first = publish(registry, "alpha", tiny_base, seed=1, rank=4)
    second = publish(registry, "alpha", tiny_base, seed=2, rank=4, alias="prod")
    found = [asked(tiny_base.source, name) for name in ("alpha@1", "alpha@2", f"alpha@{first.manifest_digest}")]

    assert [each.lora_name for each in found] == ["alpha@1", "alpha@2", f"alpha@{first.manifest_digest}"]
    assert [Path(each.lora_path) for each in found] == [first.path, second.path, first.path]
    assert (Path(found[0].lora_path) / "adapter_model.safetensors").is_file()
    assert len({each.lora_int_id for each in found}) == 2


# what is asked for, and a part of the reason in the log
REFUSED = {
    "the newest": ("alpha", "it may mean another version later"),
    "latest": ("alpha@latest", "it may mean another version later"),
    "an alias": ("alpha@prod", "it may mean another version later"),
    "a part of a digest": ("alpha@sha256:0123456789ab", "it may mean another version later"),
    "another spelling": ("alpha@v1", "write alpha@1"),
    "a mix": ("alpha@1*0.5+alpha@2*0.5", "merge it with `qhub merge`"),
    "DoRA": ("dora@1", "DoRA, which vLLM does not compute"),
    "rows of embeddings": ("tokens@1", "rows of the embeddings, which vLLM does not compute"),
    "another base's": ("foreign@1", "made for another base"),
    "nobody knows whose": ("orphan@1", "does not say that it was made for base 'tiny'"),
    "a router": ("router@1", "is a router"),
    "an unknown version": ("alpha@9", "alpha"),
    "an unknown name": ("nobody@1", "nobody"),
    "no name": ("../../etc/passwd", "is not a name"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_nothing_else_is(asked, registry: Registry, tiny_base: BaseInfo, tmp_path: Path, caplog, kind: str) -> None:
    """What may mean another version later, or what vLLM cannot add to its model, is not found; the log says why."""
    version = publish(registry, "alpha", tiny_base, seed=1, rank=4, alias="prod")
    files = {file.path: version.path / file.path for file in version.files}
    if kind == "DoRA":
        publish(registry, "dora", tiny_base, seed=1, rank=4, dora=True)
    if kind == "rows of embeddings":
        publish_tokens(registry, "tokens", tiny_base, tmp_path, [64, 257], 1)
    registry.publish("foreign", files, {"base": {"name": "other", "fingerprint": f"sha256:{'0' * 64}"}})
    registry.publish("orphan", files, {})
    registry.publish("router", {"router.json": b"{}", "router.safetensors": b""}, {"kind": "router"})
    name, reason = REFUSED[kind]
    with caplog.at_level(logging.WARNING):
        assert asked(tiny_base.source, name) is None

    (record,) = caplog.records
    assert reason in record.getMessage()
    assert name in record.getMessage()


def test_whose_model_it_is(asked, registry: Registry, tiny_base: BaseInfo, caplog, monkeypatch) -> None:
    """A base is known by what it was made of, wherever that is mounted, or by its name in the environment."""
    publish(registry, "alpha", tiny_base, seed=1, rank=4)

    assert asked(tiny_base.source, "alpha@1") is not None
    assert asked("someone/else", "alpha@1") is None
    assert "set QHUB_VLLM_BASE" in caplog.text
    monkeypatch.setenv("QHUB_VLLM_BASE", "tiny")
    assert asked("someone/else", "alpha@1") is not None
    monkeypatch.setenv("QHUB_VLLM_BASE", "tinny")
    assert asked("someone/else", "alpha@1") is None
    assert "did you mean tiny?" in caplog.text


def test_a_remote_has_it(asked, registry: Registry, tiny_base: BaseInfo, caplog, monkeypatch, tmp_path) -> None:
    """What the home has not is brought from the remote, once, unless vLLM could not use it."""
    there = Registry(home_at(tmp_path / "elsewhere"))
    remote = add_remote(there.home, "team", str(tmp_path / "team"))
    version = publish(there, "alpha", tiny_base, seed=1, rank=4)
    files = {file.path: version.path / file.path for file in version.files}
    foreign = there.publish("foreign", files, {"base": {"name": "other", "fingerprint": f"sha256:{'0' * 64}"}})
    push(there, vllm.open_store(remote), [version, foreign])

    assert asked(tiny_base.source, "alpha@1") is None
    monkeypatch.setenv("QHUB_VLLM_REMOTE", str(tmp_path / "team"))
    found = asked(tiny_base.source, "alpha@1")
    assert Path(found.lora_path) == registry.resolve("alpha@1").path
    assert registry.resolve("alpha@1").content_digest == version.content_digest
    assert asked(tiny_base.source, "foreign@1") is None
    assert registry.names() == ["alpha"]
    caplog.clear()
    assert asked(tiny_base.source, "alpha@2") is None
    assert "has no 'alpha@2'" in caplog.text
    monkeypatch.setenv("QHUB_VLLM_REMOTE", "nowhere")
    assert asked(tiny_base.source, "alpha@1") is not None


def test_a_number_is_not_given_twice(asked, registry: Registry, tiny_base: BaseInfo, caplog, monkeypatch, tmp_path):
    """A number that this home has used for another version, which was removed, never means the remote's."""
    publish(registry, "alpha", tiny_base, seed=1, rank=4)
    remove(registry, publish(registry, "alpha", tiny_base, seed=2, rank=4))
    there = Registry(home_at(tmp_path / "elsewhere"))
    remote = add_remote(there.home, "team", str(tmp_path / "team"))
    versions = [publish(there, "alpha", tiny_base, seed=seed, rank=4) for seed in (3, 4)]
    push(there, vllm.open_store(remote), versions)
    monkeypatch.setenv("QHUB_VLLM_REMOTE", str(tmp_path / "team"))

    for name in ("alpha@2", f"alpha@{versions[1].manifest_digest}"):  # of which the number is a part
        caplog.clear()
        assert asked(tiny_base.source, name) is None
        assert "give vLLM a home of its own" in caplog.text


def test_vllm_finds_it_and_no_torch_comes_along() -> None:
    """The entry point is the plugin's, which imports no torch and does nothing where there is no vLLM."""
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    values = {point.name: point.value for point in points}
    assert values.get("qhub", "adapterhub_local.vllm:register") == "adapterhub_local.vllm:register"
    code = "import sys, adapterhub_local.vllm as v; v.register(); print({'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE, capture_output=True, text=True)
    assert done.stdout == "set()\n"
