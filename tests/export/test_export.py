"""Exports are read back by the tools they are for: PEFT, transformers, gguf; templates render as the tokenizer does."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo, find_base
from adapterhub_local.base.load import load_base
from adapterhub_local.base.shapes import linear_shapes
from adapterhub_local.base.source import open_source
from adapterhub_local.errors import BadFile, Incompatible, InputError, InUse
from adapterhub_local.export.divergence import measure
from adapterhub_local.export.families import GgufLayout
from adapterhub_local.export.formats import FORMATS, OPTIONS
from adapterhub_local.export.fused import write_fused
from adapterhub_local.export.gguf import normal_form, write_gguf
from adapterhub_local.export.requantise import add_requantised
from adapterhub_local.lora.adapter import Delta, open_adapter
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.architectures import save_architecture
from tests.serve.adapter_makers import publish
from tests.tiny import save_tiny_model


def test_normal_form_is_the_same_delta() -> None:
    """Brought to a higher rank with scaling 1 a delta is unchanged, also with a negative scaling."""
    delta = Delta(torch.randn(3, 8), torch.randn(6, 3), -1.7)

    normal = normal_form(delta, 5)

    assert (normal.rank, normal.scaling) == (5, 1.0)
    torch.testing.assert_close(normal.dense(), delta.dense())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "falcon", "falcon-new", "gpt-neox"])
def test_reordered_rows_come_back(home: Home, tmp_path: Path, kind: str) -> None:
    """The order of rows that a family has in GGUF is undone when adapters are read."""
    base = add_base("tiny", save_architecture(kind, tmp_path / "model"), home)
    layout = GgufLayout(base)
    moved = 0
    for module, (rows, _) in linear_shapes(base).items():
        weight = torch.arange(rows)[:, None]
        there = layout.to_gguf(module, weight)
        assert torch.equal(layout.from_gguf(module, there), weight)
        moved += not torch.equal(there, weight)
    assert (moved > 0) == (kind not in ("qwen2", "falcon"))  # with one key head Falcon's rows are in order already


def test_gguf_adapter_says_what_it_is(tiny_base: BaseInfo, registry: Registry, tmp_path: Path) -> None:
    """The file has llama.cpp's keys, one alpha that is its rank, both factors of every module, and base and digest."""
    version = publish(registry, "a", tiny_base, seed=1, rank=4, use_rslora=True)
    target = tmp_path / "a.gguf"

    write_gguf(open_adapter(version.path), tiny_base, target, name="a@1", digest=version.content_digest)

    reader = gguf.GGUFReader(target)
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert (said["general.type"], said["adapter.type"], said["adapter.lora.alpha"]) == ("adapter", "lora", 4.0)
    assert (said["general.architecture"], said["qhub.content_digest"]) == ("llama", version.content_digest)
    assert said["general.base_model.0.repo_url"] == f"https://huggingface.co/{tiny_base.hub_id}"
    shapes = {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors}
    assert len(shapes) == 2 * 7 * 2
    assert shapes["blk.1.ffn_down.weight.lora_a"] == (128, 4)  # gguf names the inner dimension first
    assert shapes["blk.0.attn_k.weight.lora_b"] == (4, 32)
    with pytest.raises(InUse):
        write_gguf(open_adapter(version.path), tiny_base, target, name="a@1")


def test_fused_model_is_base_and_adapter(tiny_base: BaseInfo, registry: Registry, tmp_path: Path) -> None:
    """transformers loads the folder alone; its logits are those of PEFT but for 16-bit rounding, whose KL is small."""
    version = publish(registry, "a", tiny_base, seed=1)
    fused = write_fused(tiny_base, open_adapter(version.path), tmp_path / "fused")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32)
    base = load_base(tiny_base, dtype=torch.float32, device="cpu")
    ids = torch.tensor([[5, 9, 100, 40]])
    with torch.inference_mode():
        plain = base.model(input_ids=ids).logits
        wanted = PeftModel.from_pretrained(base.model, str(version.path)).eval()(input_ids=ids).logits
        found = model(input_ids=ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
    assert float((plain - wanted).norm() / wanted.norm()) > 0.2
    assert 0 < fused.relative_rounding < 0.1
    assert "quantization_config" not in json.loads((tmp_path / "fused" / "config.json").read_bytes())
    assert AutoTokenizer.from_pretrained(tmp_path / "fused").chat_template
    divergence = measure(tiny_base, version.path, tmp_path / "fused")
    assert 0 < divergence.mean < 0.02
    assert divergence.same_greedy > 0.9


def test_fused_base_alone_is_written_in_shards(tiny_base: BaseInfo, tmp_path: Path, monkeypatch) -> None:
    """Without an adapter the folder is the dequantised base; a large one is several files that load as one."""
    monkeypatch.setattr("adapterhub_local.export.fused.SHARD_BYTES", 50_000)
    fused = write_fused(tiny_base, None, tmp_path / "base")

    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    assert fused.relative_rounding == 0
    ids = torch.tensor([[5, 9, 100, 40]])
    with torch.inference_mode():
        wanted = load_base(tiny_base, dtype=torch.float32, device="cpu").model(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)(input_ids=ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_families_that_are_not_known_are_refused(home: Home, registry: Registry, tmp_path: Path) -> None:
    """A base whose family GGUF orders in ways not known here is named, and nothing is written."""
    base = add_base("tiny", save_tiny_model(tmp_path / "model"), home)
    version = publish(registry, "a", base, seed=1)
    config = base.folder / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"olmo"'))

    with pytest.raises(Incompatible, match="GGUF is known for llama, mistral, qwen2, qwen3, gemma2"):
        write_gguf(open_adapter(version.path), base, tmp_path / "a.gguf", name="a")
    assert not (tmp_path / "a.gguf").exists()


def test_command_line_exports(tiny_base: BaseInfo, registry: Registry, tmp_path: Path) -> None:
    """Each format is one command; PEFT loads what is for PEFT; a wrong ending is reported before anything is done."""
    version = publish(registry, "a", tiny_base, seed=1)

    def export(*arguments: str) -> str:
        command = importlib.import_module("adapterhub_local.cli.export").command
        return CliRunner().invoke(command, ["a", *arguments], catch_exceptions=False, standalone_mode=False).stdout

    export("--to", "peft", "-o", str(tmp_path / "peft"))
    said = json.loads(export("--to", "fused", "-o", str(tmp_path / "fused"), "--requantise", "again", "--json"))
    told = export("--to", "gguf", "-o", str(tmp_path / "a.gguf"))
    whole = json.loads(export("--to", "fused-gguf", "--type", "q8_0", "-o", str(tmp_path / "b.gguf"), "--json"))
    export("--to", "fused-gguf", "--vocabulary", str(tmp_path / "b.gguf"), "-o", str(tmp_path / "c.gguf"))

    assert (whole["base"], whole["type"], whole["context"]) == ("tiny", "q8_0", 512)
    assert whole["size"] == (tmp_path / "b.gguf").stat().st_size < (tmp_path / "c.gguf").stat().st_size
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {file.path for file in version.files}
    assert (said["versions"], said["format"], said["base"]) == (["a@1"], "fused", "tiny")
    assert 0 < said["kl"]["mean"] < 0.02 < said["requantised"]["kl"]["mean"]
    assert find_base("again", registry.home).source == "a@1 fused"
    assert told == f"a@1 -> {tmp_path}/a.gguf: rank and alpha 8, for a GGUF of tiny\n"
    for arguments, reason in (
        (["--to", "gguf", "-o", str(tmp_path / "a.bin")], r"must end in \.gguf"),
        (["--to", "peft", "-o", str(tmp_path / "peft")], "exists already"),
        (["--to", "peft", "--requantise", "x", "-o", str(tmp_path / "x")], "--requantise is for --to fused, not for"),
        (["--to", "gguf", "--type", "f32", "-o", str(tmp_path / "x.gguf")], "--type is for --to fused-gguf and ollama"),
        (["--to", "fused", "--requantise", "tiny", "-o", str(tmp_path / "x")], "base 'tiny' exists already"),
    ):
        with pytest.raises(InputError, match=reason):
            export(*arguments)
    assert not (tmp_path / "x").exists()


def test_every_format_is_one_row() -> None:
    """Each row's writer is there, its options are those of the command, and a folder has no ending."""
    command = importlib.import_module("adapterhub_local.cli.export").command
    for row in FORMATS.values():
        module, _, function = row.writer.partition(":")
        assert callable(getattr(importlib.import_module(f"adapterhub_local.export.{module}"), function))
        assert row.options <= set(OPTIONS)
        assert f"--to {row.name}" in command.help
    spelled = {option for parameter in command.params for option in parameter.opts}
    assert set(OPTIONS.values()) <= spelled


def test_small_delta_does_not_come_through_four_bits(
    tiny_base: BaseInfo, registry: Registry, home: Home, tmp_path: Path
) -> None:
    """Fused and rounded to 4 bits again a weak adapter is mostly lost, a strong one mostly kept."""
    losses = {}
    for name, strength in (("weak", 0.02), ("strong", 3.0)):
        adapter = open_adapter(publish(registry, name, tiny_base, seed=1, strength=strength).path)
        write_fused(tiny_base, adapter, tmp_path / name)
        new, losses[name] = add_requantised(name, tmp_path / name, tiny_base, adapter, home, source_name="fused")
        assert new.num_quantised == tiny_base.num_quantised

    assert losses["weak"].projection < 0.3
    assert losses["weak"].relative_error > 0.5
    assert losses["strong"].projection > 0.9
    assert losses["strong"].relative_error < 0.2


def test_fused_onto_the_16_bit_model(
    tiny_base: BaseInfo, tiny_folder: Path, registry: Registry, tmp_path: Path
) -> None:
    """With --onto the delta is added to the model the base was made from; another model is refused."""
    adapter = open_adapter(publish(registry, "a", tiny_base, seed=1).path)
    source = open_source(tiny_folder)
    write_fused(tiny_base, adapter, tmp_path / "fused", onto=source)

    name = "model.layers.0.mlp.up_proj"
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32).state_dict()
    wanted = source.read(f"{name}.weight").float() + adapter.delta(name).dense()
    torch.testing.assert_close(state[f"{name}.weight"], wanted, atol=1e-2, rtol=1e-2)
    other = open_source(save_tiny_model(tmp_path / "other", num_hidden_layers=1))
    with pytest.raises(Incompatible, match="it is not what base 'tiny' was made from"):
        write_fused(tiny_base, adapter, tmp_path / "no", onto=other)
    nan = replace(source, read=lambda one: source.read(one) / (one != f"{name}.weight"))
    with pytest.raises(BadFile, match=rf"{name}.weight has NaN or infinity"):
        write_fused(tiny_base, adapter, tmp_path / "no", onto=nan, check=False)
    assert not (tmp_path / "no").exists()
