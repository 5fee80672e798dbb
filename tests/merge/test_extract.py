"""Extraction finds the LoRA that was fused in, and says what it cannot hold."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.shapes import linear_shapes
from adapterhub_local.base.source import open_source
from adapterhub_local.cli.extract import command
from adapterhub_local.errors import BadFile, Incompatible, InputError
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.merge.extract import Weights, extract
from adapterhub_local.merge.space import leading
from adapterhub_local.registry import Registry
from tests.serve.adapter_makers import publish
from tests.tiny import save_tiny_model


def opened(folder: Path) -> Weights:
    source = open_source(folder)
    return Weights(folder.name, source.names, source.read)


def tuned(folder: Path, target: Path, registry: Registry, base: BaseInfo, *, embeddings: bool = False) -> Path:
    """The 16-bit model at `folder` with a LoRA of rank 4 added in float32, as full fine-tuning might end."""
    adapter = open_adapter(publish(registry, "secret", base, seed=7, rank=4).path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = model.state_dict()
    for module, delta in adapter.deltas():
        state[f"{module}.weight"] += delta.dense()
    if embeddings:
        state["model.embed_tokens.weight"] *= 1.5
    model.save_pretrained(target)
    for file in folder.glob("token*"):
        shutil.copy(file, target)
    return target


def test_fused_lora_is_found_again(tiny_folder: Path, tiny_base: BaseInfo, registry: Registry, tmp_path: Path) -> None:
    """From base and base + delta comes the delta, with all its energy, and nothing for what did not change."""
    after = tuned(tiny_folder, tmp_path / "tuned", registry, tiny_base)
    linears = {module: shape for module, shape in linear_shapes(tiny_base).items() if module != "lm_head"}
    (tmp_path / "out").mkdir()

    _, report = extract(opened(tiny_folder), opened(after), linears, 4, tmp_path / "out")

    found, secret = open_adapter(tmp_path / "out"), open_adapter(registry.resolve("secret").path)
    assert report.retained_energy == pytest.approx(1, abs=1e-6)
    assert (found.modules, report.left_out) == (secret.modules, {})
    for module, delta in secret.deltas():
        torch.testing.assert_close(found.delta(module).dense(), delta.dense(), atol=1e-4, rtol=1e-3)


def test_command_reports_energy_and_what_is_left_out(
    tiny_folder: Path, tiny_base: BaseInfo, registry: Registry, tmp_path: Path
) -> None:
    """`qhub extract` registers the LoRA with its lineage; a lower rank keeps less; changed embeddings are named."""
    after = tuned(tiny_folder, tmp_path / "tuned", registry, tiny_base, embeddings=True)

    done = CliRunner().invoke(
        command, [str(tiny_folder), str(after), "--rank", "2", "--name", "mine", "--json"], catch_exceptions=False
    )

    said = json.loads(done.stdout)
    assert 0.3 < said["retained_energy"] < 0.99
    assert said["relative_error"] == pytest.approx((1 - said["retained_energy"]) ** 0.5)
    assert said["left_out"]["model.embed_tokens.weight"] == pytest.approx(0.5, abs=0.01)
    version = registry.resolve("mine")
    assert (version.lineage["kind"], version.base_fingerprint) == ("extract", tiny_base.fingerprint)
    assert version.lineage["extract"]["after"] == "tuned"
    assert open_adapter(version.path).config.rank == 2


def test_quantised_base_gives_its_rounding_too(
    tiny_folder: Path, tiny_base: BaseInfo, registry: Registry, tmp_path: Path
) -> None:
    """Against the 4-bit base the difference is its rounding, of which a low rank keeps little, as the report says."""
    done = CliRunner().invoke(
        command, ["tiny", str(tiny_folder), "--rank", "4", "--name", "x", "--json"], catch_exceptions=False
    )

    assert json.loads(done.stdout)["retained_energy"] < 0.5


def test_models_of_other_shapes_are_refused(
    tiny_folder: Path, tiny_base: BaseInfo, registry: Registry, tmp_path: Path
) -> None:
    """Another size, missing layers, or no difference at all are one sentence each."""
    linears = {module: shape for module, shape in linear_shapes(tiny_base).items() if module != "lm_head"}
    wide = opened(save_tiny_model(tmp_path / "wide", intermediate_size=192))
    shallow = opened(save_tiny_model(tmp_path / "shallow", num_hidden_layers=1))
    base = opened(tiny_folder)
    cases = ((wide, Incompatible, "of two models of one shape"), (shallow, Incompatible, "it is another model"),
             (base, InputError, "nothing to extract"))  # fmt: skip
    for index, (other, error, message) in enumerate(cases):
        folder = tmp_path / str(index)
        folder.mkdir()
        with pytest.raises(error, match=message):
            extract(base, other, linears, 4, folder)


@pytest.mark.parametrize("part", ["layers.0.self_attn.q_proj.weight", "norm.weight"])
@pytest.mark.parametrize("is_tuned", [False, True], ids=["base", "tuned"])
def test_a_model_that_is_damaged_is_refused(
    part: str, is_tuned: bool, tiny_folder: Path, tiny_base: BaseInfo, registry: Registry, tmp_path: Path
) -> None:
    """NaN in either model, in a layer or beside them, is refused by its name; nothing is registered."""
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_folder, damaged)
    tensors = load_file(damaged / "model.safetensors")
    name = next(key for key in tensors if key.endswith(part))
    tensors[name].flatten()[0] = float("nan")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    models = [tiny_folder, damaged] if is_tuned else [damaged, tiny_folder]
    done = CliRunner().invoke(command, [*map(str, models), "--name", "x"])
    assert isinstance(done.exception, BadFile)
    assert str(done.exception).startswith(f"{name} has NaN or infinity in it")
    assert "damaged is damaged" in str(done.exception)  # the folder's name, and what it is
    assert registry.versions() == []


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(0, 2**31 - 1))
def test_randomised_decomposition_is_the_best_one(rank: int, seed: int) -> None:
    """A large matrix of known spectrum gets the singular values of the full SVD, and its loss is known exactly."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(300, 40, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(280, 40, generator=generator)).Q
    values = 0.7 ** torch.arange(40)
    matrix = left * values @ right.T

    kept = leading(matrix, rank, torch.Generator().manual_seed(0))

    best = float(values[rank:].double().square().sum())
    assert kept.lost(rank) == pytest.approx(best, rel=1e-2, abs=1e-6)
    delta = kept.truncate(rank).dense()
    assert float((matrix - delta).double().square().sum()) == pytest.approx(kept.lost(rank), rel=1e-2, abs=1e-6)


def test_extracted_adapter_is_the_same_twice(
    tiny_folder: Path, tiny_base: BaseInfo, registry: Registry, tmp_path: Path
) -> None:
    """Equal models give equal bytes."""
    after = tuned(tiny_folder, tmp_path / "tuned", registry, tiny_base)
    for name in ("one", "two"):
        CliRunner().invoke(command, [str(tiny_folder), str(after), "--name", name], catch_exceptions=False)

    assert registry.resolve("one").content_digest == registry.resolve("two").content_digest


def test_base_must_be_named_where_there_are_several(tiny_folder: Path, tiny_base: BaseInfo, registry: Registry) -> None:
    """With two bases the LoRA's own has to be said."""
    add_base("other", tiny_folder, registry.home)

    with pytest.raises(InputError, match="say with --base which one"):
        CliRunner().invoke(
            command, [str(tiny_folder), str(tiny_folder), "--name", "x"], catch_exceptions=False, standalone_mode=False
        )
