"""Adapters of a thousand modules, compared in a browser: the picture and the page stay small at every width."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapterhub_local.registry import Registry
from adapterhub_local.settings import home as home_at
from serve.console.budget import BYTES, NODES, size_of
from tests.patience import PATIENCE
from tests.serve.console.conftest import Console
from tests.serve.console.test_pages import Look
from tests.stores import LINEAGE

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 143


def many_modules(seed: int) -> dict[str, Path | bytes]:
    """The files of an adapter of 1,001 modules of rank 1."""
    entries, data = {}, b""
    for layer in range(LAYERS):
        for kind in KINDS:
            for side, shape in (("A", [1, 2]), ("B", [2, 1])):
                name = f"base_model.model.model.layers.{layer}.mlp.{kind}.lora_{side}.weight"
                entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + 8]}
                data += struct.pack("<2f", 1.0, (seed * layer) % 5 - 2.0)
    header = json.dumps(entries).encode()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": list(KINDS)}
    return {
        "adapter_model.safetensors": struct.pack("<Q", len(header)) + header + data,
        "adapter_config.json": json.dumps(config).encode(),
    }


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """A console over two versions of many modules."""
    registry = Registry(home_at(tmp_path_factory.mktemp("deep")))
    for seed in (1, 2):
        registry.publish("deep", many_modules(seed), LINEAGE)
    running = Console(registry)
    yield running
    running.stop()


def test_a_thousand_modules_fit_on_a_page(deep: Console, look: Look) -> None:
    """Measured by the page's own button; groups of layers are shown, and all modules are in the JSON it links to."""
    page = look(f"{deep.url}/console/compare?left=deep@1&right=deep@2")
    page.get_by_role("button", name="Measure").click()
    page.locator("svg.heat").wait_for(timeout=1000 * PATIENCE)
    page.get_by_text("Each square is the mean of up to 5 layers.").wait_for()
    for width in (320, 390, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        assert page.locator("svg.heat rect").count() < 300
    page.get_by_text("The first modules, of 1001").click()
    path = page.get_by_role("link", name="what was measured, as JSON").get_attribute("href")
    assert len(httpx.get(deep.url + path, trust_env=False).json()["result"]["modules"]) == LAYERS * len(KINDS)
    size, nodes = size_of(httpx.get(page.url, trust_env=False).content)
    assert size <= BYTES
    assert nodes <= NODES
