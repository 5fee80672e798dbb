"""End to end on the real demo base: the demo runs, and what it made is served as plain PEFT computes it.

python -m pytest tests/test_demo.py        # about 3 minutes on 2 cores
"""

import os
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

from adapterhub_local.base.bases import find_base
from adapterhub_local.base.load import load_base
from adapterhub_local.base.source import open_source
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.settings import home as home_at
from examples.demo import demo_base

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.demo_base, pytest.mark.timeout(900)]
PROMPTS = ("The capital of France is", "Once upon a time there was a", "1, 2, 3,")


def run_demo(home: Home) -> str:
    """The demo, on a small part of the data, in its own home."""
    command = [sys.executable, "examples/demo.py", "--examples", "32", "--tests", "8"]
    environment = {**os.environ, "QHUB_HOME": str(home.root)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, str]:
    """A home in which the demo has run, and what it printed."""
    home = home_at(tmp_path_factory.mktemp("demo"))
    return home, run_demo(home)


@pytest.fixture(scope="module")
def served(demo: tuple[Home, str]) -> Iterator[httpx.Client]:
    """A server over the demo's home, on the loopback."""
    import uvicorn

    from serve import create_app

    home, _ = demo
    app = create_app(load_base(find_base("smollm2", home), dtype=torch.float32), registry=Registry(home))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
        yield client
    server.should_exit = True
    thread.join(30)


def test_the_demo(demo: tuple[Home, str]) -> None:
    """The demo trains, merges, scores and answers; run again it makes nothing twice."""
    home, output = demo
    again = run_demo(home)

    for name in ("smollm2", "sentiment", "origin", "both"):
        assert name in output.rpartition("$ qhub serve --base")[2]
    assert output.count("$ qhub train") == 2
    assert "$ qhub train" not in again
    assert "$ qhub eval" not in again
    assert [str(version) for version in Registry(home).versions()] == ["both@1", "origin@1", "sentiment@1"]


def test_training_was_worth_it(demo: tuple[Home, str]) -> None:
    """Even two steps on real text lower the loss on texts that were not seen."""
    home, _ = demo
    scores = Registry(home).resolve("sentiment").lineage["metrics"]["sentiment"]

    assert scores["adapter"]["loss"] < scores["base"]["loss"]


def test_gguf_is_read_as_transformers_reads_it(demo: tuple[Home, str]) -> None:
    """Reading a GGUF tensor by tensor gives what transformers' own conversion gives, rotary order too."""
    from transformers import AutoModelForCausalLM, GgufConfig

    path = demo_base()
    source = open_source(path)
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).state_dict()

    assert source.names == {name for name in theirs if name != "lm_head.weight"}
    for name in sorted(source.names):
        assert torch.equal(source.read(name), theirs[name]), name


@pytest.mark.parametrize("name", ["smollm2", "sentiment", "origin", "both"])
def test_the_server_computes_what_peft_computes(demo: tuple[Home, str], served: httpx.Client, name: str) -> None:
    """Greedy tokens equal plain PEFT's, log-probabilities agree to 1e-4, while other adapters run in the same batch."""
    home, _ = demo
    base = load_base(find_base("smollm2", home), dtype=torch.float32)
    model = base.model
    if name != "smollm2":
        model = PeftModel.from_pretrained(model, str(Registry(home).resolve(name).path)).eval()

    def ask(prompt: str, asked: str, results: dict) -> None:
        body = {"model": asked, "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 1}
        results[prompt, asked] = served.post("/v1/completions", json=body).json()

    results: dict[tuple[str, str], dict] = {}
    others = [other for other in ("smollm2", "sentiment", "origin", "both") if other != name]
    pairs = [(prompt, asked) for prompt in PROMPTS for asked in (name, *others[:2])]
    threads = [threading.Thread(target=ask, args=(*pair, results)) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt in PROMPTS:
        ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )
            tail = model(input_ids=written[:, :-1]).logits[0, ids.shape[1] - 1 :].log_softmax(-1)
        new = written[0, ids.shape[1] :]
        expected = tail.gather(1, new[:, None])[:, 0]
        choice = results[prompt, name]["choices"][0]
        text = base.tokenizer.decode(new, skip_special_tokens=True)
        logprobs = torch.tensor(choice["logprobs"]["token_logprobs"])

        assert choice["text"] == text
        assert len(logprobs) >= len(new) - 1, "all but a stop token is reported"
        assert torch.allclose(logprobs, expected[: len(logprobs)], atol=1e-4)
