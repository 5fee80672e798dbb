"""A server whose adapters come and go: a root of folders to load from, few slots, one adapter pinned."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from serve.engine.options import EngineOptions
from serve.options import HttpOptions
from tests.serve.adapter_makers import publish
from tests.serve.conftest import Server

NUM_FOLDERS = 10
OPTIONS = EngineOptions(max_rows=8, max_adapters=3, tokens_per_step=64, queue_limit=64)


@pytest.fixture(scope="module")
def lora_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that adapters may be loaded from."""
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def living(built_base, lora_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with three slots, one of them taken by an adapter that was pinned at the start; ten folders."""
    registry = Registry(tmp_path_factory.mktemp("living"))
    base = read_record(built_base)
    for number in range(NUM_FOLDERS):
        version = publish(registry, f"v{number}", base, seed=number, rank=(4, 8)[number % 2])
        (lora_root / f"good{number}").mkdir()
        for file in version.path.iterdir():
            (lora_root / f"good{number}" / file.name).write_bytes(file.read_bytes())
    http = HttpOptions(lora_root=lora_root, pins=("v0",))
    running = Server(load_base(base, device="cpu"), registry, http=http, options=OPTIONS)
    yield running
    running.stop()
