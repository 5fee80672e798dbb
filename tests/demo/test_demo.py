"""End to end on the real demo base: the demo runs as a user runs it, and makes nothing twice; its base with adapters is
served as plain PEFT computes it, over HTTP by a server as the product starts it.

python -m pytest tests/demo        # about 3 minutes on 2 cores, most of it this file
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.base.load import LoadedBase, load_base
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.settings import home as home_at
from examples.demo import BASE
from serve import create_app
from serve.server import DrainingServer, http_config
from tests.serve.adapter_makers import publish

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.demo_base, pytest.mark.timeout(900)]
PROMPTS = ("The capital of France is", "Once upon a time there was a")
NAMES = ("smollm2", "first", "second", "narrow")
TOKENS = 8


def run_demo(home: Home) -> str:
    """The demo, on a small part of the data, in its own home."""
    command = [sys.executable, "examples/demo.py", "--examples", "16", "--tests", "4"]
    environment = {**os.environ, "QHUB_HOME": str(home.root)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home for the demo."""
    return home_at(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def output(demo_home: Home) -> str:
    """What the demo printed in a home of its own."""
    return run_demo(demo_home)


def test_the_demo(demo_home: Home, output: str) -> None:
    """The demo trains, merges, scores and answers; run again it makes nothing twice."""
    again = run_demo(demo_home)

    for name in ("smollm2", "sentiment", "origin", "both"):
        assert name in output.rpartition("$ qhub serve --base")[2]
    assert output.count("$ qhub train") == 2
    assert "$ qhub train" not in again
    assert "$ qhub eval" not in again
    assert [str(version) for version in Registry(demo_home).versions()] == ["both@1", "origin@1", "sentiment@1"]


def test_training_was_worth_it(demo_home: Home, output: str) -> None:
    """Even one step on real text lowers the loss on texts that were not seen."""
    scores = Registry(demo_home).resolve("sentiment").lineage["metrics"]["sentiment"]

    assert scores["adapter"]["loss"] < scores["base"]["loss"]


@pytest.fixture(scope="module")
def served_home(demo_home: Home, output: str, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Another home with the base that the demo has added, and no adapter yet."""
    place = home_at(tmp_path_factory.mktemp("served"))
    shutil.copytree(demo_home.bases, place.bases)
    return place


@pytest.fixture(scope="module")
def smollm2(served_home: Home) -> BaseInfo:
    """That base."""
    return read_record(served_home.bases / BASE)


@pytest.fixture(scope="module")
def adapters(served_home: Home, smollm2: BaseInfo) -> Registry:
    """Three adapters of different ranks and modules that change the answers."""
    registry = Registry(served_home)
    publish(registry, "first", smollm2, seed=1, rank=16, strength=0.2)
    publish(registry, "second", smollm2, seed=2, rank=8, strength=0.3)
    publish(registry, "narrow", smollm2, seed=3, rank=4, strength=0.5, modules=("q_proj", "v_proj"))
    return registry


@pytest.fixture(scope="module")
def served(adapters: Registry, smollm2: BaseInfo) -> Iterator[httpx.Client]:
    """A server over that registry, on the loopback."""
    app = create_app(load_base(smollm2, dtype=torch.float32), registry=adapters)
    server = DrainingServer(http_config(app, port=0), app.state.services, lambda: None)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False) as client:
        yield client
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def answers(served: httpx.Client) -> dict[tuple[str, str], dict]:
    """(prompt, model) -> the greedy answer, all of them asked for at the same time."""
    results: dict[tuple[str, str], dict] = {}

    def ask(prompt: str, name: str) -> None:
        body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
        results[prompt, name] = served.post("/v1/completions", json=body).json()

    threads = [threading.Thread(target=ask, args=(prompt, name)) for prompt in PROMPTS for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture(scope="module")
def plain(smollm2: BaseInfo) -> LoadedBase:
    """The base alone, for PEFT."""
    return load_base(smollm2, dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_the_server_computes_what_peft_computes(
    adapters: Registry, plain: LoadedBase, answers: dict[tuple[str, str], dict], name: str
) -> None:
    """Greedy tokens equal plain PEFT's, log-probabilities agree to 1e-4, while other adapters run in the same batch."""
    model = plain.model
    if name != "smollm2":
        model = PeftModel.from_pretrained(model, str(adapters.resolve(name).path)).eval()
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([plain.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
            )
            tail = model(input_ids=written[:, :-1]).logits[0, ids.shape[1] - 1 :].log_softmax(-1)
        new = written[0, ids.shape[1] :]
        expected = tail.gather(1, new[:, None])[:, 0]
        choice = answers[prompt, name]["choices"][0]
        logprobs = torch.tensor(choice["logprobs"]["token_logprobs"])
        texts.append(choice["text"])

        assert choice["text"] == plain.tokenizer.decode(new, skip_special_tokens=True)
        assert len(logprobs) >= len(new) - 1, "all but a stop token is reported"
        assert torch.allclose(logprobs, expected[: len(logprobs)], atol=1e-4)
    if name != "smollm2":
        model.unload()
        assert texts != [answers[prompt, "smollm2"]["choices"][0]["text"] for prompt in PROMPTS]
