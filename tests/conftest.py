"""Every test has its own QHUB_HOME and no network; `tiny_base` is a real NF4 base that loads in a moment."""

import gc
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.places import MEMORY, is_roomy

# Bytecode is kept, also where an image says otherwise: each of the processes that tests start would compile all anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # before huggingface_hub is imported: no test may ask a real hub
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["QHUB_COMPUTE"] = "float32"  # one answer on every CPU, those with units for bfloat16 included
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before bitsandbytes imports Triton: kernels run on the CPU, slowly
if is_roomy(MEMORY):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.lora.config import WEIGHTS, AdapterConfig
from adapterhub_local.lora.write import write_adapter
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.settings import home as home_at
from tests.adapter_files import factors
from tests.hub_server import HubServer
from tests.synced import folder_store, merge, s3_server, store  # noqa: F401

sys.dont_write_bytecode = False  # what the environment said when this process began

# No example fails for the time it takes: other work on the machine makes any of them slow.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

# A shell starts what runs in its background with Ctrl-C ignored, which all that is started from here would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


FIGURES: list[str] = []  # what tests measured, of this process or, where tests run in several, of all of them


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> list[str]:
    """Lines that are printed at the end of the run: figures that are worth a look, and no test fails for."""
    sent: list[str] = getattr(request.config, "workeroutput", {}).setdefault("figures", FIGURES)
    return sent


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the figures of a process that is done."""
    FIGURES.extend(getattr(node, "workeroutput", {}).get("figures", ()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the figures."""
    for line in FIGURES:
        terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without the collector: nearly all that is made meanwhile stays, modules and tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


_frozen = 0  # modules when the collector was last told to leave alone what there is


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """Spare the collector the modules, and the tests themselves, each time many have come.

    Accelerate has everything looked through at the begin of each training: a quarter of the time that such tests take.
    """
    global _frozen
    if len(sys.modules) > _frozen + 200:
        _frozen = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and lose much where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """This test's own home, also in the environment of what it starts."""
    monkeypatch.setenv("QHUB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QHUB_DEVICE", raising=False)
    return home_at()


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    """A server that a test starts in this process logs to that test's standard error, which is closed behind it."""
    yield
    for name in ("serve", "serve.access", "opentelemetry"):  # as serve.listen.log_json sets them
        log = logging.getLogger(name)
        if log.handlers:
            log.handlers, log.propagate = [], True
            log.setLevel(logging.NOTSET)


@pytest.fixture
def registry(home: Home) -> Registry:
    """The registry of this test's home."""
    return Registry(home)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub on loopback, without repositories."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder with a tiny random 16-bit model."""
    from tests.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def built_base(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model as a base, made once."""
    from adapterhub_local.base.add import add_base

    return add_base("tiny", tiny_folder, home_at(tmp_path_factory.mktemp("bases")), hub_id="someone/tiny").folder


@pytest.fixture
def tiny_base(built_base: Path, home: Home) -> BaseInfo:
    """The base `tiny` in this test's home."""
    shutil.copytree(built_base, home.bases / "tiny")
    return read_record(home.bases / "tiny")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a recipe beside a training and a test file, and returns its path."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "test.jsonl").write_text("{}\n")

    def to_file(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


@pytest.fixture(scope="session")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sound adapter in one file."""
    folder = tmp_path_factory.mktemp("small")
    tensors = factors({"m.q": (3, 2, 2)})
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_adapter(folder, AdapterConfig(2, 4, ("q",)), shapes, tensors.items(), None)
    return folder / WEIGHTS
