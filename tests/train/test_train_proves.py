"""A run proves its result: every step learns, what is registered was changed, and what was said is kept."""

from pathlib import Path

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.recipe import load_recipe
from adapterhub_local.settings import Home
from adapterhub_local.train.past_runs import list_runs, read_log
from adapterhub_local.train.train import train
from tests.chats import write_recipe


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_only_step_of_a_run_learns(tmp_path: Path, home: Home, tiny_base: BaseInfo, schedule: str) -> None:
    """A run of one step has a learning rate above zero in it, and its factors B are not zero."""
    path = write_recipe(tmp_path, count=4)
    changes = ("train.epochs=1", f"train.schedule={schedule}", "data.test_share=0")
    version = train(load_recipe(path, changes), home)
    (entry,) = [entry for entry in read_log(list_runs(home)[-1].folder) if "loss" in entry]
    from safetensors.torch import load_file

    factors = load_file(version.path / "adapter_model.safetensors")
    assert entry["learning_rate"] > 0
    assert all(bool(torch.any(factor != 0)) for name, factor in factors.items() if "lora_B" in name)
