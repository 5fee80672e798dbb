"""On a GPU: a recipe trains, and the server answers with what it trained."""

from pathlib import Path

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.train.train import train
from serve.engine.build import build_engine
from serve.engine.request import Request, SamplingParams
from tests.chats import write_recipe
from tests.gpu.check import NO_GPU
from tests.tiny import byte_tokenizer

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
]


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "adamw"])
def test_a_recipe_trains(optimizer: str, tmp_path: Path, home: Home, tiny_base: BaseInfo) -> None:
    """Loss falls, on the GPU, and the server takes the adapter."""
    recipe = load_recipe(write_recipe(tmp_path), ["train.epochs=8", f"train.optimizer='{optimizer}'"])
    version = train(recipe, home)
    curve = version.lineage["training"]["curve"]

    assert version.lineage["environment"]["device"] == DEVICE
    assert curve[-1][1] < curve[0][1]
    base = load_base(tiny_base, device=DEVICE)
    engine = build_engine(base)
    digest = engine.pool.acquire(Registry(home).resolve(str(version))).digest
    request = Request("one", tuple(byte_tokenizer().encode("a")), SamplingParams(max_tokens=4, temperature=0), digest)
    engine.submit(request)
    while engine.has_work:
        assert not [output.error for output in engine.step() if output.error]
    assert len(request.output) == 4
