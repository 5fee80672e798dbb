"""A real vLLM with the plugin beside our server, in one run: the same greedy tokens from the same adapters.

    make check-vllm             # installs vLLM's CPU build into an environment of its own first, then calls this

Both serve a tiny random Llama with two adapters. What must be equal token by token is vLLM on our NF4 base written out
in float32; on the 16-bit model that the base was made from, which is another model, the share is only reported. An
alias, a foreign base's adapter and an unknown one are vLLM's 404, and its log has the reasons. Then the gateway of
`qhub cluster` before a replica that is vLLM: any name is answered as our server answers it, a moved alias by the next
request, what vLLM cannot do is refused with its reason, and vLLM ends with its replica. The last line is JSON.
"""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.export.fused import write_fused
from adapterhub_local.export.fusion import Fusion
from adapterhub_local.registry import Registry
from adapterhub_local.settings import home
from serve.cluster.tables import Vllm
from tests.serve.adapter_makers import publish
from tests.serve.cluster.vllm_gateway import VllmGateway
from tests.serve.conftest import Server
from tests.tiny import save_tiny_model

READY_SECONDS = 400
TOKENS = 24
OPTIONS = "--dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 8 --max-loras 2 --max-lora-rank 16"
TOLERANCE = 1e-4  # nats, of a token's log-probability
PROMPTS = ("Hello there", "The quick brown fox", "1 2 3 4", "Once upon a time there was")
REFUSED = {"alpha": "another version later", "alpha@prod": "another version later", "dora@1": "DoRA",
           "foreign@1": "another base", "nobody@1": "nobody"}  # fmt: skip


def in_float32(base: BaseInfo, folder: Path) -> Path:
    """The base as a transformers folder with exactly the values that it computes with."""
    write_fused(base, None, folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    fusion = Fusion(base, None)
    weights = {name: fusion.read(name, torch.float32)[0].float().contiguous() for name in fusion.names}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder


@contextlib.contextmanager
def vllm(python: str, model: Path, log: Path) -> Iterator[str]:
    """A vLLM that serves this model by our plugin; its address. Raises RuntimeError with its log if it ends."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {
        **os.environ, "VLLM_PLUGINS": "qhub", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "QHUB_VLLM_BASE": "tiny",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment.pop("PYTHONPATH", None)  # the plugin is to be found as it is installed
    # not `vllm serve`, which looks for a distribution called vllm
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "tiny"]
    command += [*OPTIONS.split(), "--enable-lora", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as to, subprocess.Popen(command, env=environment, stdout=to, stderr=to) as process:
        try:
            deadline = time.monotonic() + READY_SECONDS
            while not _answers(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"vLLM did not start:\n{log.read_text()[-6000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        except httpx.HTTPError as error:
            raise RuntimeError(f"{error}, of vLLM:\n{log.read_text()[-6000:]}") from None
        finally:
            process.terminate()
            process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its text, and the log-probability of each token."""

    text: str
    logprobs: tuple[float, ...]

    def difference(self, other: "Answer") -> float:
        """The largest between two tokens' log-probabilities; infinite if these are not the same tokens.

        Bytes of a character that is not whole at the end are shown by one and left out by the other.
        """
        if len(self.logprobs) != len(other.logprobs) or self.text.rstrip("\ufffd") != other.text.rstrip("\ufffd"):
            return math.inf
        return max(abs(one - two) for one, two in zip(self.logprobs, other.logprobs, strict=True))


def answers(url: str, names: tuple[str, ...]) -> dict[str, Answer]:
    """What each model answers to each prompt, greedily."""
    found = {}
    for name in names:
        for prompt in PROMPTS:
            body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            answer = httpx.post(f"{url}/v1/completions", json=body | {"logprobs": 1}, timeout=300, trust_env=False)
            answer.raise_for_status()
            choice = answer.json()["choices"][0]
            found[f"{name}: {prompt}"] = Answer(choice["text"], tuple(choice["logprobs"]["token_logprobs"]))
    return found


def main(python: str) -> int:
    """Run both; 0 if all is as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.environ["QHUB_HOME"] = str(place / "home")
        source = save_tiny_model(place / "source", hidden_size=256, initializer_range=0.1)  # heads of 64, as vLLM wants
        base = add_base("tiny", source, home())
        registry = Registry(home())
        for seed, name in enumerate(("alpha", "beta"), 1):
            publish(registry, name, base, seed=seed, rank=8, alias="prod")
        publish(registry, "dora", base, seed=3, dora=True)
        alpha = registry.resolve("alpha@1")
        files = {file.path: alpha.path / file.path for file in alpha.files}
        registry.publish("foreign", files, {"base": {"name": "other", "fingerprint": f"sha256:{'0' * 64}"}})
        publish(registry, "alpha", base, seed=4, rank=8)
        names = ("tiny", "alpha@1", "beta@1", "alpha@2")
        server = Server(load_base(base, device="cpu"), registry)
        try:
            ours = answers(server.url, names)
        finally:
            server.stop()
        found: dict[str, Any] = {"answers": len(ours), "tokens": TOKENS}
        for kind, model in (("nf4_in_float32", in_float32(base, place / "same")), ("source_in_16_bits", source)):
            log = place / f"{kind}.log"
            with vllm(python, model, log) as url:
                theirs = answers(url, names)
                refused = {name: _status(url, name) for name in REFUSED}
            text = log.read_text()
            differences = [ours[key].difference(theirs[key]) for key in ours]
            found[kind] = {
                "equal": sum(each < math.inf for each in differences),
                "largest_difference": max((each for each in differences if each < math.inf), default=None),
                "different_answers": len(set(theirs.values())),
                "refused": refused,
                "reasons": {name: reason in text for name, reason in REFUSED.items()},
            }
            sys.stderr.write(f"{kind}: {json.dumps(found[kind])}\n")
        found["gateway"] = behind_gateway(python, place / "same", base, registry, ours)
    same = found["nf4_in_float32"]
    is_good = (
        same["equal"] == len(ours)
        and same["largest_difference"] < TOLERANCE
        and all(same["reasons"].values())
        and set(same["refused"].values()) == {404}
        and found["gateway"]["equal"] == len(ours)
        and all(found["gateway"]["checks"].values())
    )
    sys.stdout.write(f"{json.dumps(found | {'is_good': is_good})}\n")
    return 0 if is_good else 1


def behind_gateway(
    python: str, model: Path, base: BaseInfo, registry: Registry, ours: dict[str, Answer]
) -> dict[str, Any]:
    """What clients of the gateway get: answers beside our server's, and whether what must be refused is."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    command = (python, "-m", "vllm.entrypoints.openai.api_server", "--model")
    gateway = VllmGateway(base, registry, Vllm(str(model), command=command, options=tuple(OPTIONS.split())))
    try:
        theirs = answers(gateway.url, ("tiny", "alpha@1", "beta", "alpha"))  # each is the newest, or named
        spelled = {"beta": "beta@1", "alpha": "alpha@2"}
        theirs = {_respelled(key, spelled): answer for key, answer in theirs.items()}
        registry.set_alias("alpha", "prod", 2)
        moved = answers(gateway.url, ("alpha@prod",))
        equal = sum(ours[key].difference(answer) < TOLERANCE for key, answer in theirs.items())
        stream = gateway.ask("beta", max_tokens=4, stream=True).text
        checks = {
            "moved": all(ours[_respelled(key, {"alpha@prod": "alpha@2"})].difference(answer) < TOLERANCE
                         for key, answer in moved.items()),
            "streamed": stream.rstrip().endswith("data: [DONE]") and stream.count("data: ") > 2,
            "mix": gateway.ask("alpha*0.5+beta*0.5").status_code == 400,
            "dora": "DoRA" in gateway.ask("dora").text,
            "foreign": "another base" in gateway.ask("foreign").text,
            "unknown": gateway.ask("nobody").status_code == 404,
        }  # fmt: skip
        process = gateway.replica.engine._process  # type: ignore[attr-defined]
    finally:
        gateway.stop()
    checks["ended"] = process.poll() is not None
    sys.stderr.write(f"gateway: {json.dumps(checks)}\n")
    return {"equal": equal, "checks": checks}


def _respelled(key: str, names: dict[str, str]) -> str:
    name, _, prompt = key.partition(": ")
    return f"{names.get(name, name)}: {prompt}"


def _status(url: str, name: str) -> int:
    body = {"model": name, "prompt": "Hi", "max_tokens": 1}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=300, trust_env=False).status_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
