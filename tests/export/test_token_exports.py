"""Rows of embeddings in what is exported: written into whole models, refused where a format has no place for them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.weights import BaseWeights
from adapterhub_local.errors import Incompatible
from adapterhub_local.export.formats import Request, export
from adapterhub_local.export.fused import write_fused
from adapterhub_local.export.gguf_model import write_gguf_model
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.token_adapters import EMBEDDINGS, base_of_kind, loaded_by_peft, logits_of, publish

IDS = (5, 64, 9, 257, 3, 11)
KINDS = {"list": [64, 257], "both": {"embed_tokens": [257, 5], "lm_head": [64, 11]}, "head": {"lm_head": [64, 11]}}


@pytest.fixture(scope="module", params=["tied", "untied"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseInfo, Registry, Path]:
    """A base of each kind with the adapters of the table, and a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    home = Home(folder / "home")
    info, registry = base_of_kind(request.param, home, folder), Registry(home)
    for seed, (name, indices) in enumerate(KINDS.items()):
        publish(registry, name, info, folder, indices, seed)
    return info, registry, folder


@pytest.mark.parametrize("name", KINDS)
def test_a_fused_model_has_the_rows(place: tuple[BaseInfo, Registry, Path], name: str) -> None:
    """Loaded without PEFT it answers as PEFT on the base; a tied head stays tied unless it has rows of its own."""
    info, registry, folder = place
    version = registry.resolve(name)
    made = write_fused(info, open_adapter(version.path, tokens=True), folder / f"fused-{name}", check=True)
    model = AutoModelForCausalLM.from_pretrained(folder / f"fused-{name}", dtype=torch.float32).eval()
    found, wanted = (torch.log_softmax(logits_of(one, IDS), -1) for one in (model, loaded_by_peft(info, version.path)))
    is_tied = BaseWeights(info).tied != {}

    assert made.divergence is not None
    assert made.divergence.mean < 1e-2
    torch.testing.assert_close(found, wanted, atol=0.15, rtol=0.05)  # all is rounded to 16 bits
    assert model.config.tie_word_embeddings == (is_tied and name == "list")


@pytest.mark.parametrize("name", ["list", "both"])
def test_a_whole_gguf_has_the_rows(place: tuple[BaseInfo, Registry, Path], name: str) -> None:
    """Its embeddings and its head are the base's with the adapter's rows in them."""
    import gguf

    info, registry, folder = place
    adapter, target = open_adapter(registry.resolve(name).path, tokens=True), folder / f"{name}.gguf"
    try:
        write_gguf_model(info, adapter, target, name=name, kind="f32")
    except Incompatible as error:  # of its vocabulary
        pytest.fail(str(error))
    tensors = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in gguf.GGUFReader(target).tensors}
    base = BaseWeights(info).of(EMBEDDINGS)[0]
    head = BaseWeights(info).of("lm_head")[0]
    base[list(adapter.tokens[EMBEDDINGS].ids)] = adapter.rows(EMBEDDINGS)
    torch.testing.assert_close(tensors["token_embd.weight"], base, atol=2e-2, rtol=1e-2)
    if "lm_head" in adapter.tokens:
        head[list(adapter.tokens["lm_head"].ids)] = adapter.rows("lm_head")
    if "lm_head" in adapter.tokens or not BaseWeights(info).tied:
        torch.testing.assert_close(tensors["output.weight"], head, atol=2e-2, rtol=1e-2)
    else:
        assert "output.weight" not in tensors


def test_a_gguf_adapter_cannot_hold_them(place: tuple[BaseInfo, Registry, Path]) -> None:
    """llama.cpp has no place for rows: the message says so, and what holds them; PEFT's own form and one file do."""
    info, registry, folder = place
    version = registry.resolve("list")
    home = registry.home
    with pytest.raises(Incompatible, match=r"rows of the embeddings for 2 tokens, and a GGUF adapter.*--to fused"):
        export(Request(version, home, folder / "adapter.gguf"), "gguf")
    assert not (folder / "adapter.gguf").exists()
    export(Request(version, home, folder / "one.safetensors"), "file")
    export(Request(version, home, folder / "peft"), "peft")
    wanted = open_adapter(version.path, tokens=True).rows(EMBEDDINGS)
    assert torch.equal(open_adapter(folder / "one.safetensors", tokens=True).rows(EMBEDDINGS), wanted)
    torch.testing.assert_close(
        logits_of(loaded_by_peft(info, folder / "peft"), IDS), logits_of(loaded_by_peft(info, version.path), IDS)
    )
