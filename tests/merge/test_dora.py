"""DoRA outside the trainer: compared and fused through its base as PEFT computes it, refused where it has no place."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.base.weights import BaseWeights
from adapterhub_local.export.divergence import measure
from adapterhub_local.export.fused import write_fused
from adapterhub_local.export.gguf_model import write_gguf_model
from adapterhub_local.export.ollama import write_ollama
from adapterhub_local.export.requantise import add_requantised
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.cli.test_cli import Qhub, qhub  # noqa: F401
from tests.serve.adapter_makers import publish

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
IDS = torch.tensor([[5, 9, 100, 40, 7, 200]])


@torch.inference_mode()
def test_a_fused_dora_is_what_peft_merges(tiny_base: BaseInfo, registry: Registry, tmp_path: Path) -> None:
    """Every weight is PEFT's own merge of it into the dequantised base, rounded once; so are the logits, nearly."""
    version = publish(registry, "d", tiny_base, seed=1, dora=True)
    write_fused(tiny_base, None, tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    for name, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.weight.copy_(BaseWeights(tiny_base).of(name)[0])  # as trained: not rounded to 16 bits
    fused = write_fused(tiny_base, open_adapter(version.path, dora=True), tmp_path / "fused")

    merged = PeftModel.from_pretrained(plain, str(version.path)).merge_and_unload()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32)
    wanted = dict(merged.named_parameters())
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], atol=5e-3, rtol=8e-3, msg=name)
    assert 0 < fused.relative_rounding < 0.1
    base = load_base(tiny_base, dtype=torch.float32, device="cpu")
    without = base.model(IDS).logits
    logits = PeftModel.from_pretrained(base.model, str(version.path)).eval()(IDS).logits
    assert float((found(IDS).logits - logits).norm() / logits.norm()) < 0.02
    assert float((without - logits).norm() / logits.norm()) > 0.2
    divergence = measure(tiny_base, version.path, tmp_path / "fused")
    assert 0 < divergence.mean < 0.02


def test_what_four_bits_keep_of_a_dora(tiny_base: BaseInfo, registry: Registry, home: Home, tmp_path: Path) -> None:
    """The loss of rounding again is measured against all that DoRA changes: of a strong one most comes through."""
    adapter = open_adapter(publish(registry, "d", tiny_base, seed=1, dora=True, strength=3.0).path, dora=True)
    write_fused(tiny_base, adapter, tmp_path / "fused")
    _, loss = add_requantised("again", tmp_path / "fused", tiny_base, adapter, home, source_name="fused")

    assert loss.projection > 0.9
    assert loss.relative_error < 0.25


def test_diff_counts_all_that_dora_changes(qhub: Qhub, tiny_base: BaseInfo, registry: Registry) -> None:  # noqa: F811
    """Norms and cosines are those of W' - W, with a plain adapter too; without the base it says which is missing."""
    dora, plain = publish(registry, "d", tiny_base, seed=1, dora=True), publish(registry, "p", tiny_base, seed=1)
    told = json.loads(qhub("diff", "d", "p", "--json").out)

    one, other = open_adapter(dora.path, dora=True), open_adapter(plain.path)
    assert len(told["modules"]) == len(one.modules) == 14
    for entry in told["modules"][::5]:
        module = entry["module"]
        weight = BaseWeights(tiny_base).of(module)[0].double()
        changed = weight + one.delta(module).dense()
        lengths = one.magnitude(module).double() / (weight.bfloat16() + one.delta(module).dense()).double().norm(dim=1)
        change, delta = lengths[:, None] * changed - weight, other.delta(module).dense().double()
        assert entry["left"] == pytest.approx(float(change.norm()), rel=1e-4)
        assert entry["right"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert entry["cosine"] == pytest.approx(float((change * delta).sum() / change.norm() / delta.norm()), abs=1e-4)
    same = qhub("diff", "d", "d")
    assert same.code == 0
    (total,) = (line.split() for line in same.out.splitlines() if line.startswith(" all "))
    assert total[-1] == "1"
    assert qhub("base", "rm", "tiny", "--force").code == 0
    missing = qhub("diff", "p", "d")
    assert (missing.code, "d@1 was made for" in missing.err, "qhub base add" in missing.err) == (2, True, True)
    assert qhub("diff", "p", "p").code == 0


def test_formats_that_cannot_hold_dora(qhub: Qhub, tiny_base: BaseInfo, registry: Registry, tmp_path: Path) -> None:  # noqa: F811
    """GGUF has no place for lengths: the error says what to run instead, and that works. Ollama gets it fused."""
    version = publish(registry, "d", tiny_base, seed=1, dora=True)
    refused = qhub("export", "d", "--to", "gguf", "-o", "d.gguf")
    assert refused.code == 2
    assert "qhub merge d@1 --weights 1 --with-base tiny --name NAME" in refused.err
    assert list(Path.cwd().iterdir()) == []

    write_ollama(open_adapter(version.path, dora=True), tiny_base, tmp_path / "whole", name="d@1", digest="x")
    write_gguf_model(tiny_base, open_adapter(version.path, dora=True), tmp_path / "fused.gguf", name="d@1", digest="x")
    weights = [[tensor.data.tobytes() for tensor in GGUFReader(tmp_path / file).tensors]
               for file in ("whole/model.gguf", "fused.gguf")]  # fmt: skip
    assert weights[0] == weights[1]
    made = json.loads(qhub("merge", "d@1", "--weights", "1", "--with-base", "tiny", "--name", "plain", "--json").out)
    (conversion,) = made["conversions"]
    (parent,) = registry.resolve("plain").lineage["parents"]
    assert parent["content_digest"] == version.content_digest
    assert parent["converted"]["relative_error"] == conversion["relative_error"] > 0
    assert qhub("export", "plain", "--to", "gguf", "-o", "d.gguf").code == 0
