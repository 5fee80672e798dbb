"""Adapters made elsewhere: adopted as they are, and only by force for another base."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapterhub_local.adopt import adopt
from adapterhub_local.errors import Incompatible
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
