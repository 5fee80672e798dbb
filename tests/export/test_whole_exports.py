"""The law of exports: every module of the adapter is in what is written, or nothing is written at all."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.shapes import linear_shapes, tied_weights
from adapterhub_local.base.weights import BaseWeights, dequantised
from adapterhub_local.errors import BadFile, Incompatible, QhubError
from adapterhub_local.export import divergence, fusion
from adapterhub_local.export.fused import write_fused
from adapterhub_local.export.gguf import write_gguf
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.architectures import save_architecture
from tests.serve.adapter_makers import write_random
from tests.tiny import save_tiny_model

TIED = ("llama-tied", "gemma2", "gemma3", "falcon-new")
UNTIED = ("llama", "phi3", "gpt-neox")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseInfo]:
    """Tiny bases of several families, with heads of their own and tied ones."""
    folder = tmp_path_factory.mktemp("bases")
    made = {}
    for kind in (*TIED, *UNTIED):
        model = folder / kind
        if kind == "llama-tied":
            save_tiny_model(model, tie_word_embeddings=True)
        else:
            save_architecture(kind, model)
        made[kind] = add_base(kind, model, Home(folder / "home"))
    return made


def write_adapter_for(base: BaseInfo, folder: Path, *endings: str, dora: bool = False, **settings) -> Path:
    """A random adapter of the layers whose names end so (all but the head if none is said)."""
    linears = {name: (columns, rows) for name, (rows, columns) in linear_shapes(base).items()}
    wanted = endings or tuple(name for name in linears if name != "lm_head")
    shapes = {name: shape for name, shape in linears.items() if name.endswith(wanted)}
    norms = {name: weight.norm(dim=1) for name, weight, _ in dequantised(base, shapes)} if dora else None
    folder.mkdir()
    write_random(
        folder, shapes, seed=1, modules=sorted({name.rpartition(".")[2] for name in shapes}), norms=norms,
        target_modules=tuple(shapes), fingerprint=base.fingerprint, **settings,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("kind", "adapted"),
    [
        *((kind, "head") for kind in (*TIED, "llama", "gpt-neox")),
        *(("llama-tied", other) for other in ("head-dora", "all", "first-layer")),
        *((kind, "all") for kind in ("gemma2", "phi3")),
    ],
)
def test_fused_is_base_and_adapter(bases, tmp_path: Path, kind: str, adapted: str) -> None:
    """Whatever part of the model is adapted, a tied output head too, the fused model passes its own check."""
    base = bases[kind]
    endings = {"head": ("lm_head",), "head-dora": ("lm_head",), "all": (), "first-layer": ("0.mlp.down_proj",
               "0.mlp.dense_4h_to_h")}[adapted]  # fmt: skip
    folder = write_adapter_for(base, tmp_path / "adapter", *endings, dora=adapted == "head-dora")

    fused = write_fused(base, open_adapter(folder, dora=True), tmp_path / "fused", check=True)

    assert fused.divergence.mean < divergence.LIMIT / 2
    config = json.loads((tmp_path / "fused" / "config.json").read_bytes())
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "fused").state_dict()
    is_tied = state["lm_head.weight"].data_ptr() == state[tied_weights(base)["lm_head.weight"]].data_ptr() \
        if kind in TIED else config["tie_word_embeddings"]  # fmt: skip
    assert is_tied == (kind in TIED and "head" not in adapted)


def test_an_adapted_head_leaves_the_embeddings_alone(bases, tmp_path: Path) -> None:
    """Untied on writing, the head has the delta and the embeddings are what they were."""
    base = bases["llama-tied"]
    adapter = open_adapter(write_adapter_for(base, tmp_path / "adapter", "lm_head"))
    write_fused(base, adapter, tmp_path / "fused")

    state = AutoModelForCausalLM.from_pretrained(tmp_path / "fused").state_dict()
    embeddings = BaseWeights(base).read("model.embed_tokens.weight")
    assert torch.equal(state["model.embed_tokens.weight"], embeddings)
    wanted = embeddings.float() + adapter.delta("lm_head").dense()
    torch.testing.assert_close(state["lm_head.weight"].float(), wanted, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["llama-tied", "llama"])
def test_gguf_adapter_has_every_module_or_is_refused(bases, tmp_path: Path, kind: str) -> None:
    """An adapted head that is tied in the base has no tensor in a GGUF: the export is refused, with the way out."""
    adapter = open_adapter(write_adapter_for(bases[kind], tmp_path / "adapter", "lm_head", "q_proj"))

    if kind == "llama":
        write_gguf(adapter, bases[kind], tmp_path / "a.gguf", name="a@1")
        import gguf

        names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
        assert len(names) == 2 * len(adapter.modules)
        assert "output.weight.lora_a" in names
    else:
        with pytest.raises(Incompatible, match=r"adapts lm_head, .* tied to the embeddings there\. Export it with"):
            write_gguf(adapter, bases[kind], tmp_path / "a.gguf", name="a@1")
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("module", ["model.embed_tokens", "model.layers.7.mlp.up_proj", "model.layers.0.mlp.gate_up"])
def test_modules_that_are_not_the_bases_are_refused(bases, tmp_path: Path, module: str) -> None:
    """Embeddings, layers beyond the last and other families' names: refused by name, nothing is written."""
    (tmp_path / "a").mkdir()
    write_random(tmp_path / "a", {module: (64, 320)}, seed=1, modules=[module.rpartition(".")[2]])
    adapter = open_adapter(tmp_path / "a")
    for write in (write_fused, lambda base, adapter, target: write_gguf(adapter, base, target, name="a")):
        with pytest.raises(Incompatible, match=rf"adapts {module}, which base 'llama' .* does not have"):
            write(bases["llama"], adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_module_that_is_not_met_is_refused(bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the base's files lack a weight that the adapter changes, the export fails by name and leaves nothing."""
    base = bases["llama"]
    adapter = open_adapter(write_adapter_for(base, tmp_path / "adapter"))
    names = BaseWeights.names.fget
    monkeypatch.setattr(BaseWeights, "names", property(lambda self: [n for n in names(self) if "1.mlp.up" not in n]))

    with pytest.raises(Incompatible, match=r"model\.layers\.1\.mlp\.up_proj\.weight .*has no place"):
        write_fused(base, adapter, tmp_path / "fused")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_failed_check_is_a_failure(
    bases, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused model that is not base and adapter ends with code 1, the measure and the limit, and leaves nothing."""
    source = write_adapter_for(bases["llama"], tmp_path / "adapter")
    files = {path.name: path for path in source.iterdir()}
    registry.publish("a", files, {"base": bases["llama"].lineage()})
    (registry.home.bases).mkdir(parents=True)
    (registry.home.bases / "llama").symlink_to(bases["llama"].folder)
    plain = fusion.weight_change
    monkeypatch.setattr(fusion, "weight_change", lambda *arguments: 0.2 * plain(*arguments))
    command = importlib.import_module("adapterhub_local.cli.export").command
    export = ["a", "--to", "fused", "-o", str(tmp_path / "fused")]

    done = CliRunner().invoke(command, export)

    assert type(done.exception) is QhubError
    assert done.exception.exit_code == 1
    assert "failed its check and was not kept: KL" in str(done.exception)
    assert "at most 0.05 nats a token" in str(done.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "home"]
    CliRunner().invoke(command, [*export, "--no-check"], catch_exceptions=False)
    assert (tmp_path / "fused").is_dir()


def test_not_a_number_fails_the_check() -> None:
    """A divergence that cannot be computed is not a small one."""
    found = divergence.Divergence(float("nan"), float("nan"), 0.0, 5)
    with pytest.raises(QhubError, match="failed its check"):
        found.check()
    dataclasses.replace(found, mean=0.01).check()


def test_embeddings_among_the_factors_are_refused(tmp_path: Path) -> None:
    """PEFT's own spelling of adapted embeddings is not a linear layer's, and is refused when it is opened."""
    from safetensors.torch import save_file

    (tmp_path / "a").mkdir()
    write_random(tmp_path / "a", {"model.layers.0.mlp.up_proj": (64, 128)}, seed=1, modules=["up_proj"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 320)}, path)
    with pytest.raises(BadFile):
        open_adapter(tmp_path / "a")
