"""Serving and training on a GPU: every tensor is where it is used, and nothing waits for the GPU without need.

The GPU is pretended (tests/pretend_gpu.py); tests/gpu has what only a real one shows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.base.load import LoadedBase
from adapterhub_local.evaluate.metrics import evaluate
from adapterhub_local.plan.device import find_device
from adapterhub_local.recipe import load_recipe
from adapterhub_local.rows.examples import read_chats, tokenise
from adapterhub_local.settings import Home
from adapterhub_local.train.adapter import with_adapter
from adapterhub_local.train.preflight import preflight
from adapterhub_local.train.trainer import make_trainer
from adapterhub_local.train.watch import Watch
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.graphs import Graphs
from serve.engine.loop import EngineLoop
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams
from serve.kernels import reference
from serve.kernels.choose import Kernels
from tests.chats import write_recipe
from tests.pretend_gpu import moved, pretend_gpu
from tests.tiny import byte_tokenizer, llama_config

KERNELS = {"add_lora": reference.add_lora, "paged_attention": reference.paged_attention}
GREEDY = {"temperature": 0}
WAYS: list[dict[str, Any]] = [
    GREEDY,
    GREEDY,
    {"top_p": 0.9, "seed": 3},
    {"top_k": 20, "seed": 5, "logprobs": 3},
    {**GREEDY, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "logit_bias": ((5, 2.0),), "min_tokens": 4},
    {"min_p": 0.05, "seed": 1},
]


class Adapters:
    """Random adapters of two ranks in the place of the engine's pool; `dora` has scales, too."""

    def __init__(self, engine: Engine) -> None:
        self.records = engine.slots.records
        layers = engine.slots.layers.items()
        self.shapes = {name: (each.in_features, each.out_features) for name, each in layers if name != "lm_head"}

    @contextmanager
    def holding(self, digest: str) -> Iterator[dict[str, tuple[torch.Tensor, ...]]]:
        draw = torch.Generator().manual_seed(len(digest))
        rank = 4 if digest == "four" else 8
        yield {
            name: (
                torch.randn(inside, rank, generator=draw) / 10,
                torch.randn(rank, out, generator=draw) / 10,
                *([torch.randn(out, generator=draw) / 10] if digest == "dora" else []),
            )
            for name, (inside, out) in self.shapes.items()
        }

    def release(self, digest: str) -> None:
        pass


def tiny_model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(llama_config(), dtype=torch.float32).eval().requires_grad_(False)


def engine_over(model: Any, info: BaseInfo) -> Engine:
    engine = build_engine(LoadedBase(info, model, byte_tokenizer()), EngineOptions(max_rows=8))
    engine.pool = engine.loader.pool = Adapters(engine)  # type: ignore[assignment]
    return engine


def answers(engine: Engine, adapters: list[str | None], ways: list[dict[str, Any]], waits: Any = None) -> list:
    """Answers to one prompt for each way; with `waits` no step may wait more than twice."""
    requests = [
        Request(str(number), tuple(range(3 + number, 20 + 7 * number)), SamplingParams(max_tokens=12, **way), adapter)
        for number, (adapter, way) in enumerate(zip(adapters, ways, strict=True))
    ]
    for adapter in adapters:
        if adapter is not None:
            engine.pool.records.make(adapter)
    engine.submit(*requests)
    while engine.has_work:
        if waits is not None:
            waits.clear()
        assert not [output.error for output in engine.step() if output.error]
        assert waits is None or sum(waits.values()) <= 2, waits  # for the likeliest token and its logit
    return [request.output for request in requests]


@pytest.fixture
def info(built_base: Path) -> BaseInfo:
    return read_record(built_base)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The pretended GPU."""
    with pretend_gpu(monkeypatch) as counts:
        yield counts


def test_the_pretended_gpu_refuses_mixed_devices(waits: Any) -> None:
    """What a GPU refuses is refused here, too, or the tests below would prove nothing."""
    there, here = torch.zeros(3, device="cuda"), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert (there + here.to("cuda")).tolist() == [1.0] * 3
    assert waits["tolist"] == 1


@pytest.mark.parametrize("way", ["torch", "kernels", "static"])
def test_serving_on_a_gpu(way: str, info: BaseInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed adapters and samplers, by plain torch, by kernels and in the steps that graphs are made of: the tokens of
    the CPU; a greedy step without adapters waits only for its tokens."""
    adapters = ["four", None, "eight", "dora" if way != "static" else "eight", "four", None]
    wanted = answers(engine_over(tiny_model(), info), adapters, WAYS)
    chosen = None if way == "torch" else Kernels(dict(KERNELS))
    monkeypatch.setattr("serve.engine.build.choose_kernels", lambda *_: chosen)
    graphs = lambda *args, **more: Graphs(*args, **more, is_captured=False, settled=1)  # noqa: E731
    monkeypatch.setattr("serve.engine.build.Graphs", graphs if way == "static" else lambda *_, **__: None)
    with pretend_gpu(monkeypatch) as waits:
        engine = engine_over(moved(tiny_model()), info)

        assert engine.runner.device.type == "cuda"
        assert answers(engine, adapters, WAYS) == wanted
        answers(engine, [None] * 3, [GREEDY] * 3, waits)
        if way == "static":
            assert engine.runner.graphs is not None
            assert engine.runner.graphs.reason is None
            assert len(engine.runner.graphs) >= 2


def train(model: Any, folder: Path, home: Home, info: BaseInfo) -> list[float]:
    """The losses of a few steps, and last that of what they made of the model."""
    recipe = load_recipe(write_recipe(folder), ["train.optimizer='adamw'", "train.activation_checkpointing=true"])
    examples = tokenise(read_chats(folder / "train.jsonl"), byte_tokenizer(), 512)
    adapted = with_adapter(LoadedBase(info, model, byte_tokenizer()), recipe)
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    losses: list[float] = []
    trainer = make_trainer(adapted, examples, recipe, folder, Watch(lambda entry: losses.append(entry["loss"])))
    preflight(trainer, examples, home)
    trainer.train()
    return [*losses, evaluate(adapted.eval(), examples, 4).loss]


def test_training_on_a_gpu(info: BaseInfo, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one of two GPUs: packed rows, checkpointing, preflight, trainer and evaluation with the losses of the CPU."""
    wanted = train(tiny_model(), tmp_path, home, info)
    with pretend_gpu(monkeypatch) as waits:
        # PEFT moves the factors: their parameters must become those of the GPU
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        assert train(moved(tiny_model()), tmp_path, home, info) == pytest.approx(wanted, rel=1e-6)
        assert waits["aten.nonzero.default"] == 0


def test_the_plan_is_for_the_gpu_that_torch_sees(waits: Any) -> None:
    """Not for one that is only built in."""
    assert find_device().kind == "cuda"
    assert find_device().name == "Pretended"


def test_memory_that_runs_out_in_a_step(info: BaseInfo, waits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not fit together are computed one by one, and one that does not fit alone fails alone."""
    monkeypatch.setattr("serve.engine.build.choose_kernels", lambda *_: None)
    engine = engine_over(moved(tiny_model()), info)
    wanted = answers(engine, ["four", None], [GREEDY] * 2)
    whole = engine.runner.forward

    def small(batch: Any, slots: Any) -> torch.Tensor:
        if len(batch) > 1 or batch[0].request.id == "large":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(batch, slots)

    monkeypatch.setattr(engine.runner, "forward", small)
    assert answers(engine, ["four", None], [GREEDY] * 2) == wanted
    engine.submit(Request("large", (1, 2, 3), SamplingParams(max_tokens=2)))
    assert "memory is full" in str([output.error for output in engine.step()])


def test_a_gpu_that_is_lost_ends_the_loop(info: BaseInfo, waits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error that stays, requests end and /health says so, instead of failing one by one forever."""
    monkeypatch.setattr("serve.engine.build.choose_kernels", lambda *_: None)
    engine = engine_over(moved(tiny_model()), info)

    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine.runner, "forward", broken)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    loop = EngineLoop(engine)
    engine.submit(Request("one", (1, 2, 3), SamplingParams(max_tokens=2)))
    loop._run()

    assert not engine.has_work
    assert not loop.is_alive


def test_defaults_of_a_gpu() -> None:
    """More rows and tokens a step than on a CPU; what is given stays."""
    assert EngineOptions.on("cpu") == EngineOptions()
    assert EngineOptions.on("cuda").max_rows == 64
    assert EngineOptions.on("cuda", max_rows=4, prefix_bytes=0).tokens_per_step == 2048
    assert EngineOptions.on("cpu", max_rows=600, kv_bytes=None).tokens_per_step == 600
