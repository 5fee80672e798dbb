"""Adapters in other tools' spellings become the same deltas here; what is not a language model's is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.cli.add import command
from adapterhub_local.errors import BadFile, Incompatible, InputError, NotFound, QhubError
from adapterhub_local.export.foreign import convert, is_foreign
from adapterhub_local.export.gguf import write_gguf
from adapterhub_local.lora.adapter import AdapterFile, open_adapter
from adapterhub_local.registry import Registry
from tests.serve.adapter_makers import publish

STYLES = {
    "kohya": ("lora_te_{flat}", "lora_down.weight", "lora_up.weight"),
    "kohya without model": ("lora_unet_{tail}", "lora_down.weight", "lora_up.weight"),
    "diffusers": ("transformer.{module}", "lora_A.weight", "lora_B.weight"),
    "old diffusers": ("text_encoder.{module}", "lora.down.weight", "lora.up.weight"),
}


@pytest.fixture
def ours(registry: Registry, tiny_base: BaseInfo) -> AdapterFile:
    """An adapter with rsLoRA and another alpha in some modules, so that scales are distinguished."""
    version = publish(registry, "ours", tiny_base, seed=1, use_rslora=True, alpha_pattern={"q_proj": 3.0})
    return open_adapter(version.path)


def same_deltas(left: AdapterFile, right: AdapterFile) -> None:
    """Every module's delta agrees, whatever its factors and its scale are."""
    assert left.modules == right.modules
    for module in left.modules:
        torch.testing.assert_close(left.delta(module).dense(), right.delta(module).dense(), atol=1e-5, rtol=1e-4)


def save_style(adapter: AdapterFile, style: str, path: Path) -> Path:
    """The adapter with another tool's names; kohya's have an alpha a module, for the others the scale is in B."""
    prefix, down, up = STYLES[style]
    tensors = {}
    for module, delta in adapter.deltas():
        flat = module.replace(".", "_")
        key = prefix.format(module=module, flat=flat, tail=flat.removeprefix("model_"))
        scale = delta.scaling if "kohya" not in style else 1.0
        tensors[f"{key}.{down}"], tensors[f"{key}.{up}"] = delta.A, (scale * delta.B).contiguous()
        if "kohya" in style:
            tensors[f"{key}.alpha"] = torch.tensor(delta.scaling * delta.rank)
    save_file(tensors, path)
    return path


def test_gguf_adapter_comes_back(ours: AdapterFile, tiny_base: BaseInfo, tmp_path: Path) -> None:
    """What was exported for llama.cpp is the same adapter when it is read again, order of rows included."""
    write_gguf(ours, tiny_base, tmp_path / "a.gguf", name="a")

    again = open_adapter(convert(tmp_path / "a.gguf", tiny_base, tmp_path / "out"))

    same_deltas(again, ours)
    assert (again.config.rank, again.config.alpha, again.config.use_rslora) == (8, 8, False)


@pytest.mark.parametrize("style", STYLES)
def test_other_names_are_the_same_modules(ours: AdapterFile, tiny_base: BaseInfo, tmp_path: Path, style: str) -> None:
    """kohya's flat names with an alpha for each module, and diffusers' two spellings, give the same deltas."""
    path = save_style(ours, style, tmp_path / "foreign.safetensors")

    assert is_foreign(path) is (style != "diffusers")  # whose names are PEFT's without its prefix
    assert not is_foreign(ours.path)
    alpha = None if "kohya" in style else 8.0  # which is the rank: the scale is in B
    same_deltas(open_adapter(convert(path, tiny_base, tmp_path / "out", alpha=alpha)), ours)


def test_command_adds_foreign_adapters(
    ours: AdapterFile, registry: Registry, tiny_base: BaseInfo, tmp_path: Path
) -> None:
    """`qhub add` takes them by itself and records the file they came from."""
    write_gguf(ours, tiny_base, tmp_path / "theirs.gguf", name="a")
    save_style(ours, "kohya", tmp_path / "kohya.safetensors")

    for name, file in (("one", "theirs.gguf"), ("two", "kohya.safetensors")):
        CliRunner().invoke(command, [str(tmp_path / file), "--name", name], catch_exceptions=False)
        version = registry.resolve(name)
        same_deltas(open_adapter(version.path), ours)
        named = tiny_base.hub_id if file.endswith(".gguf") else None  # kohya's file names none, and nobody claims it
        assert version.lineage["source"] == {"file": file, "base_model": named}
        assert list(registry.home.tmp.iterdir()) == []
        assert version.base_fingerprint == tiny_base.fingerprint


def test_base_that_a_gguf_names_is_checked(
    ours: AdapterFile, registry: Registry, tiny_base: BaseInfo, tmp_path: Path
) -> None:
    """A GGUF is held to the base it names, by fingerprint or by repository, as safetensors are; --force records it."""
    others = {
        "exact.gguf": replace(tiny_base, fingerprint="sha256:" + "ab" * 32),
        "named.gguf": replace(tiny_base, fingerprint="", hub_id="someone/other"),
        "same.gguf": tiny_base,
        "silent.gguf": replace(tiny_base, fingerprint="", hub_id=None),
    }
    for file, base in others.items():
        write_gguf(ours, base, tmp_path / file, name="a")

    for file, said in (("exact.gguf", "another base"), ("named.gguf", "someone/other")):
        done = CliRunner().invoke(command, [str(tmp_path / file), "--name", "x"])
        assert str(done.exception).startswith(f"{tmp_path / file} was made for {said}")
    assert (registry.names(), list(registry.home.tmp.iterdir())) == (["ours"], [])
    for file, level in (("same.gguf", "exact"), ("silent.gguf", "shapes"), ("exact.gguf", "shapes")):
        forced = ["--force"] if file == "exact.gguf" else []
        CliRunner().invoke(command, [str(tmp_path / file), "--name", "x", *forced], catch_exceptions=False)
        version = registry.resolve("x")
        assert (version.lineage["compatibility"]["level"], "forced" in version.lineage) == (level, bool(forced))


def write_adapter_gguf(path: Path, tensors: dict[str, np.ndarray], *, kind: str = "adapter", architecture="llama"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_what_cannot_be_taken_is_reported(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """Image models, other architectures, half adapters, wrong shapes and damaged files each have their sentence."""
    a, b = np.zeros((2, 64), np.float32), np.zeros((64, 2), np.float32)
    whole = {"blk.0.attn_q.weight.lora_a": a, "blk.0.attn_q.weight.lora_b": b}
    cases: list[tuple[dict, dict, type[QhubError], str]] = [
        ({**whole, "blk.7.attn_q.weight.lora_a": a}, {}, Incompatible, "blk.7.attn_q.weight.lora_a is not a factor"),
        ({"blk.0.attn_q.weight.lora_a": a}, {}, BadFile, "does not have both factors"),
        ({**whole, "blk.0.attn_q.weight.lora_b": b[:32]}, {}, Incompatible, r"is 32 x 64, in base 'tiny' it is 64"),
        ({**whole, "blk.0.attn_q.weight.lora_b": b[:, :1].copy()}, {}, BadFile, "rank 2 and 1"),
        (whole, {"kind": "model"}, BadFile, "is a GGUF model"),
        (whole, {"architecture": "qwen2"}, Incompatible, "is for a qwen2 model"),
    ]
    for index, (tensors, options, error, message) in enumerate(cases):
        path = tmp_path / f"{index}.gguf"
        write_adapter_gguf(path, tensors, **options)
        with pytest.raises(error, match=message):
            convert(path, tiny_base, tmp_path / f"out{index}")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(BadFile, match="is not a GGUF adapter"):
        convert(tmp_path / "bad.gguf", tiny_base, tmp_path / "bad")
    with pytest.raises(NotFound, match=r"there is no file .*none\.gguf"):
        convert(tmp_path / "none.gguf", tiny_base, tmp_path / "none")
    names = "lora_unet_down_blocks_0_attentions_0_proj_in"
    save_file({f"{names}.lora_down.weight": torch.zeros(2, 8), f"{names}.lora_up.weight": torch.zeros(8, 2)},
              tmp_path / "image.safetensors")  # fmt: skip
    with pytest.raises(Incompatible, match="adapters of image models are not taken"):
        convert(tmp_path / "image.safetensors", tiny_base, tmp_path / "image")


def test_alpha_of_kohyas_files_without_one(ours: AdapterFile, tiny_base: BaseInfo, tmp_path: Path) -> None:
    """A file that says no scale is asked for it; one that says it in its header, or for some modules, keeps that."""
    path = save_style(ours, "old diffusers", tmp_path / "foreign.safetensors")
    tensors, module = load_file(path), ours.modules[0]
    with pytest.raises(BadFile, match=r"nothing in it says the scale.*give --alpha .*8 for a scale of 1"):
        convert(path, tiny_base, tmp_path / "none")

    given = open_adapter(convert(path, tiny_base, tmp_path / "given", alpha=2.0))
    assert math.isclose(given.config.scaling(module), 2 / 8)
    for key, text in {"ss_network_alpha": "32", "alpha": "32.0", "lora_adapter_metadata": '{"lora_alpha": 32}'}.items():
        save_file(tensors, path, metadata={key: text})
        said = open_adapter(convert(path, tiny_base, tmp_path / key))
        assert {said.config.scaling(one) for one in said.modules} == {4.0}
        with pytest.raises(InputError, match="alpha 32, and --alpha 2 was given"):
            convert(path, tiny_base, tmp_path / "both", alpha=2.0)


def test_alphas_of_some_modules_only(ours: AdapterFile, tiny_base: BaseInfo, tmp_path: Path) -> None:
    """An alpha that is missing for one module comes from the header or from --alpha, never a guess; NaN is refused."""
    path = save_style(ours, "kohya", tmp_path / "kohya.safetensors")
    tensors = load_file(path)
    whole = open_adapter(convert(path, tiny_base, tmp_path / "whole"))
    first = next(name for name in tensors if name.endswith(".alpha"))
    alpha = float(tensors.pop(first))

    save_file(tensors, path)
    with pytest.raises(BadFile, match=r"has an alpha for 9 of its 10 modules|an alpha for \d+ of its"):
        convert(path, tiny_base, tmp_path / "one")
    same_deltas(open_adapter(convert(path, tiny_base, tmp_path / "given", alpha=alpha)), whole)
    save_file(tensors, path, metadata={"ss_network_alpha": str(alpha), "ss_network_dim": "8"})
    same_deltas(open_adapter(convert(path, tiny_base, tmp_path / "header")), whole)

    for value, why in ((float("nan"), "nan, not a finite"), (float("inf"), "inf, not a finite")):
        save_file({**tensors, first: torch.tensor(value)}, path)
        done = CliRunner().invoke(command, [str(path), "--name", "x"])
        assert isinstance(done.exception, BadFile)
        assert why in str(done.exception)
        assert str(path) in str(done.exception)


def test_mlx_adapters_are_read(ours: AdapterFile, registry: Registry, tiny_base: BaseInfo, tmp_path: Path) -> None:
    """MLX-LM's transposed factors and its scale give the same deltas, by folder and by file; DoRA is refused."""
    folder = tmp_path / "mlx"
    folder.mkdir()
    tensors = {}
    for module, delta in ours.deltas():
        tensors[f"{module}.lora_a"] = delta.A.T.contiguous()
        tensors[f"{module}.lora_b"] = (delta.scaling / 20 * delta.B.T).contiguous()
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    config: dict[str, Any] = {"fine_tune_type": "lora", "model": "mlx-community/tiny-4bit", "num_layers": 2}
    config["lora_parameters"] = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))

    for name, path in (("one", folder), ("two", folder / "adapters.safetensors")):
        CliRunner().invoke(command, [str(path), "--name", name], catch_exceptions=False)
        same_deltas(open_adapter(registry.resolve(name).path), ours)
        assert registry.resolve(name).lineage["compatibility"]["level"] == "named"  # a mirror of someone/tiny

    (folder / "adapter_config.json").write_text(json.dumps({**config, "fine_tune_type": "dora"}))
    with pytest.raises(BadFile, match="fine_tune_type = 'dora', not supported"):
        convert(folder, tiny_base, tmp_path / "dora")
    (folder / "adapter_config.json").write_text('{"lora_parameters": {"scale": 2.0, "scale": 20.0}}')
    with pytest.raises(BadFile, match="the key 'scale' occurs twice"):
        convert(folder, tiny_base, tmp_path / "twice")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(BadFile, match="nothing in it says the scale"):
        convert(folder, tiny_base, tmp_path / "none")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("adapter.alora.invocation_tokens", [5, 6], "aLoRA"),
        ("adapter.lora.invocation_tokens", [5, 6], "aLoRA"),
        ("adapter.lora.prompt_prefix", "query: ", "prompt"),
        ("adapter.alora.prompt_prefix", "query: ", "prompt"),
        ("adapter.lora.something_new", 1, "does not know this setting"),
        ("adapter.lora.task_name", "search", None),
        ("adapter.lora.prompt_prefix", "", None),
    ],
)
def test_gguf_that_is_more_than_a_plain_adapter(
    tiny_base: BaseInfo, tmp_path: Path, key: str, value: Any, reason: str | None
) -> None:
    """A GGUF that is active after certain tokens or prompts only, or in ways not known, is refused with its reason."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    add = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32}[type(value)]
    add(key, value)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 64), np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", np.ones((64, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if reason is None:
        assert convert(tmp_path / "a.gguf", tiny_base, tmp_path / "out").is_dir()
        return
    with pytest.raises(BadFile, match=reason) as caught:
        convert(tmp_path / "a.gguf", tiny_base, tmp_path / "out")
    assert key in str(caught.value)
