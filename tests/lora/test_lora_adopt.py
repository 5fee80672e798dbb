"""Adapters made elsewhere: adopted as they are, and only by force for another base."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from adapterhub_local.adopt import adopt
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.shapes import linear_shapes
from adapterhub_local.cli.add import command
from adapterhub_local.errors import Incompatible, NotFound
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.lora.config import WEIGHTS, AdapterConfig
from adapterhub_local.lora.header import read_header
from adapterhub_local.lora.write import write_adapter
from adapterhub_local.registry import Registry
from tests.adapter_files import Q, factors, save_peft

BASE = {"name": "tiny", "fingerprint": "sha256:" + "1" * 64, "hub_id": "someone/tiny"}


def test_an_adopted_adapter_keeps_its_factors_and_says_what_it_is(tmp_path: Path) -> None:
    """A PEFT folder becomes a version whose one file carries config and base, with its factors of any dtype."""
    tensors = factors({Q: (8, 6, 2)}, torch.bfloat16) | factors(
        {"model.layers.0.mlp.up_proj": (8, 4, 2)}, torch.float16
    )
    fields = {"base_model_name_or_path": "/home/me/secret/model", "target_modules": ["q_proj", "up_proj"]}
    source = save_peft(tmp_path / "peft", tensors, **fields)
    version = adopt(source, "a", Registry(), BASE, staging_folder=tmp_path)
    weights = version.path / WEIGHTS
    assert {name: tensor.dtype for name, tensor in load_file(weights).items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }
    assert all(torch.equal(load_file(weights)[name], tensor) for name, tensor in tensors.items())
    alone = Path(shutil.copy(weights, tmp_path / "alone.safetensors"))
    assert open_adapter(alone).base_fingerprint == BASE["fingerprint"]
    assert open_adapter(alone).config.base_model == "someone/tiny"
    assert "secret" not in json.dumps(version.lineage) + str(read_header(alone).metadata)


def test_an_adapter_of_another_base_is_adopted_only_by_force(tmp_path: Path) -> None:
    """The fingerprint in a file's header decides; forcing is recorded in the lineage."""
    tensors = factors({Q: (8, 6, 2)})
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    (tmp_path / "other").mkdir()
    write_adapter(tmp_path / "other", AdapterConfig(2, 4, ("q_proj",)), shapes, tensors.items(), "sha256:" + "2" * 64)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    with pytest.raises(Incompatible, match="made for another base"):
        adopt(tmp_path / "other", "a", Registry(), BASE, staging_folder=tmp_path / "one")
    assert Registry().versions() == []
    version = adopt(tmp_path / "other", "a", Registry(), BASE, staging_folder=tmp_path / "two", force=True)
    assert version.lineage["forced"] is True


def test_an_adapter_that_names_another_base_is_adopted_only_by_force(tmp_path: Path) -> None:
    """Where a file has no fingerprint the Hub id in its config decides; a path of some machine decides nothing."""
    for number, (base_model, fits) in enumerate(
        {"someone/other": False, "someone/tiny": True, "/some/model": True}.items()
    ):
        (staging := tmp_path / str(number)).mkdir()
        source = save_peft(tmp_path / "peft", factors({Q: (8, 6, 2)}), base_model_name_or_path=base_model)
        with contextlib.nullcontext() if fits else pytest.raises(Incompatible, match="was made for someone/other"):
            adopt(source, "a", Registry(), BASE, staging_folder=staging)
    assert len(Registry().versions("a")) == 2


@pytest.mark.parametrize(("fingerprint", "level"), [("sha256:" + "1" * 64, "exact"), (None, "shapes")])
def test_how_far_an_adopted_adapter_fits_is_recorded(tmp_path: Path, fingerprint: str | None, level: str) -> None:
    """A file that names this very base is an exact fit; for others only shapes are known."""
    assert BASE["fingerprint"] == "sha256:" + "1" * 64
    tensors = factors({Q: (8, 6, 2)})
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    (tmp_path / "a").mkdir()
    (tmp_path / "staged").mkdir()
    write_adapter(tmp_path / "a", AdapterConfig(2, 4, ("q_proj",)), shapes, tensors.items(), fingerprint)
    version = adopt(tmp_path / "a", "a", Registry(), BASE, staging_folder=tmp_path / "staged")
    assert version.lineage["compatibility"] == {"level": level, "base_fingerprint": fingerprint, "base_model": None}


@pytest.mark.parametrize(
    ("said", "level"),
    [
        ("someone/tiny", "named"),
        ("Someone/Tiny", "named"),
        ("unsloth/tiny-bnb-4bit", "named"),
        ("outputs/checkpoint-100", "shapes"),
        ("someone/other", "shapes"),
    ],
)
def test_a_base_that_a_person_names_counts(
    said: str, level: str, tiny_base: BaseInfo, registry: Registry, tmp_path: Path
) -> None:
    """`--base` confirms what says no base or another one, and that is recorded; who names this one needs none."""
    shapes = linear_shapes(tiny_base)
    module = next(iter(shapes))
    rows, columns = shapes[module]
    folder = save_peft(tmp_path / "a", factors({module: (rows, columns, 2)}), base_model_name_or_path=said,
                       target_modules=[module.rpartition(".")[2]], layers_to_transform=[0])  # fmt: skip
    done = CliRunner().invoke(command, [str(folder), "--name", "x", "--base", "tiny"], catch_exceptions=False)
    assert done.exit_code == 0
    compatibility = registry.resolve("x").lineage["compatibility"]
    assert compatibility["level"] == level
    assert compatibility.get("confirmed", False) is (level == "shapes")


@pytest.mark.parametrize(
    ("zero", "fields"),
    [("lora_A", {}), ("lora_B", {}), ("", {"lora_alpha": 0}), (None, {})],
    ids=["A", "B", "scale", "trained"],
)
def test_an_adapter_that_changes_nothing_is_reported(
    zero: str | None, fields: dict, tiny_base: BaseInfo, tmp_path: Path
) -> None:
    """It is registered, for a file may be worth keeping, and a note says what the server will refuse it for."""
    tensors = factors({Q: (64, 64, 2)})
    if zero:
        tensors = {name: value * (zero not in name) for name, value in tensors.items()}
    folder = save_peft(tmp_path / "a", tensors, layers_to_transform=[0], **fields)
    done = CliRunner().invoke(command, [str(folder), "--name", "x", "--base", "tiny"], catch_exceptions=False)
    assert ("x@1 changes nothing" in done.output) is (zero is not None)


def test_another_fingerprint_is_not_confirmed_by_a_name(tmp_path: Path) -> None:
    """Weights that say they were trained on another base stay refused, whoever names the base."""
    tensors = factors({Q: (8, 6, 2)})
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    (tmp_path / "a").mkdir()
    write_adapter(tmp_path / "a", AdapterConfig(2, 4, ("q_proj",)), shapes, tensors.items(), "sha256:" + "2" * 64)
    with pytest.raises(Incompatible, match=r"another base.*: --force registers it anyway"):
        adopt(tmp_path / "a", "a", Registry(), BASE, staging_folder=tmp_path, confirmed=True)


def test_adapters_in_folders_are_named(tmp_path: Path) -> None:
    """A folder of checkpoints is not an adapter: those that are there are named, and each is one by its own path."""
    for name in ("checkpoint-100", "default"):
        save_peft(tmp_path / "run" / name, factors({Q: (8, 6, 2)}))
    with pytest.raises(NotFound, match=r"adapters in its folders: checkpoint-100, default\. Name one of them"):
        open_adapter(tmp_path / "run")
    assert open_adapter(tmp_path / "run" / "default").modules == (Q,)
