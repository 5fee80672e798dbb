"""Parity forever: random requests through real HTTP get the tokens that plain PEFT and transformers give.

python -m tests.serve.http.test_parity 1000    # so many requests, at concurrency 1, 8 and 16

The server has few pages, shares prefixes, guesses as much as it can, and clients hang up in the middle. Each
token is compared with what a forward pass of the plain model, over all tokens before it, says there. A difference is
one whose margin is 1e-4 or more.
"""

import hashlib
import random
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from serve.engine.options import EngineOptions
from serve.engine.pages import PAGE
from tests.serve.adapter_makers import publish
from tests.serve.conftest import Server

MARGIN = 1e-4
PAGE_BYTES = PAGE * 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, float32
WEIGHTS: dict[str, dict[str, float]] = {  # what a model's name stands for
    "tiny": {},
    "alpha": {"alpha": 1.0},
    "beta": {"beta": 1.0},
    "gamma": {"gamma": 1.0},
    "alpha*0.7+beta*0.5": {"alpha": 0.7, "beta": 0.5},
    "beta*1.25+gamma*-0.5": {"beta": 1.25, "gamma": -0.5},
}


def draw(chance: random.Random) -> dict[str, Any]:
    """The body of a request. Prompts begin alike in places, and repeat themselves in some."""
    begin = random.Random(chance.randrange(3)).choices(range(256), k=chance.choice([0, 16, 33, 64]))
    own = chance.choices(range(256), k=chance.randint(1, 12)) * chance.choice([1, 1, 3, 5])
    body: dict[str, Any] = {
        "model": chance.choice(list(WEIGHTS)),
        "prompt": begin + own,
        "max_tokens": chance.randint(1, 48),
        "temperature": chance.choice([0, 0, 0, 0.4, 1.0, 1.6]),
        "seed": chance.randrange(1 << 30),
        "stream": chance.random() < 0.5,
        "ignore_eos": chance.random() < 0.8,
    }
    for name, value in (
        ("top_p", chance.choice([0.5, 0.9])),
        ("top_k", chance.choice([1, 5, 40])),
        ("min_p", chance.choice([0.02, 0.2])),
        ("presence_penalty", chance.uniform(-1, 1)),
        ("frequency_penalty", chance.uniform(-0.5, 1)),
        ("repetition_penalty", chance.uniform(0.9, 1.3)),
        ("logit_bias", {str(chance.randrange(256)): chance.uniform(-9, 9) for _ in range(3)}),
        ("stop_token_ids", chance.choices(range(256), k=8)),
        ("min_tokens", chance.randint(1, body["max_tokens"])),
    ):
        if chance.random() < 0.15:
            body[name] = value
    return body


class Plain:
    """The same base with the same adapters, as PEFT and transformers have them."""

    def __init__(self, base: BaseInfo, registry: Registry) -> None:
        loaded = load_base(base, device="cpu")
        self.end = loaded.tokenizer.eos_token_id
        self.tokenizer = loaded.tokenizer
        first, *others = ("alpha", "beta", "gamma")
        self.model = PeftModel.from_pretrained(loaded.model, registry.resolve(first).path, adapter_name=first).eval()
        for name in others:
            self.model.load_adapter(registry.resolve(name).path, adapter_name=name)
        self.layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        self.scaling = [dict(layer.scaling) for layer in self.layers]

    @torch.inference_mode()
    def logits(self, model: str, tokens: list[int]) -> torch.Tensor:
        """(tokens, vocabulary) in float32."""
        row = torch.tensor([tokens])
        if not WEIGHTS[model]:
            with self.model.disable_adapter():
                return self.model(input_ids=row, use_cache=False).logits[0].float()
        self.model.base_model.set_adapter(list(WEIGHTS[model]))
        for layer, scaling in zip(self.layers, self.scaling, strict=True):
            layer.scaling.update({name: scaling[name] * WEIGHTS[model].get(name, 0.0) for name in scaling})
        return self.model(input_ids=row, use_cache=False).logits[0].float()

    def differences(self, body: dict[str, Any], tokens: list[int]) -> int:
        """How many of an answer's tokens are not what belongs there."""
        prompt = body["prompt"]
        logits = self.logits(body["model"], [*prompt, *tokens])[len(prompt) - 1 :]
        return sum(not self._is_right(body, logits[place], tokens[:place], each) for place, each in enumerate(tokens))

    def ends(self, body: dict[str, Any]) -> set[int]:
        return {*body.get("stop_token_ids", ()), *([] if body["ignore_eos"] else [self.end])}

    def _is_right(self, body: dict[str, Any], logits: torch.Tensor, before: list[int], token: int) -> bool:
        adjusted, counts = logits.double(), Counter(before)
        for seen in {*body["prompt"], *before} if "repetition_penalty" in body else ():
            by = body["repetition_penalty"]
            adjusted[seen] = adjusted[seen] / by if adjusted[seen] > 0 else adjusted[seen] * by
        for seen, count in counts.items():
            adjusted[seen] -= body.get("presence_penalty", 0) + count * body.get("frequency_penalty", 0)
        for key, bias in body.get("logit_bias", {}).items():
            adjusted[int(key)] += bias
        if len(before) < body.get("min_tokens", 0):
            adjusted[list(self.ends(body))] = -torch.inf
        if body["temperature"] == 0 or body.get("top_k") == 1:
            return float(adjusted.max() - adjusted[token]) < MARGIN
        digest = hashlib.sha256(f"{body['seed']} {len(before)}".encode()).digest()
        uniform = (int.from_bytes(digest[:8], "big") >> 11) / 2**53
        return any(
            pick(adjusted, body, uniform + shift, 1 + cut) == token
            for cut in (0, MARGIN, -MARGIN)
            for shift in (0, MARGIN, -MARGIN)
        )


def pick(logits: torch.Tensor, body: dict[str, Any], uniform: float, cut: float) -> int:
    """The token at `uniform` of the distribution, with its cuts moved a little by `cut`; slow and plain."""
    order = logits.sort(descending=True).indices[: body.get("top_k")]
    weights = torch.softmax(logits[order] / body["temperature"], -1)
    keep = weights >= body.get("min_p", 0.0) * cut * weights[0]
    weights = weights * keep
    share = weights.cumsum(-1) - weights
    weights = weights * (share < body.get("top_p", 1.0) * cut * weights.sum()) if "top_p" in body else weights
    filled = torch.zeros_like(logits).scatter(0, order, weights).cumsum(-1)
    return min(int(torch.searchsorted(filled, uniform * filled[-1], right=True)), len(logits) - 1)


class Parity:
    """A server under test, the plain model beside it, and what was found."""

    def __init__(self, base: BaseInfo, registry: Registry, seed: int) -> None:
        options = EngineOptions(
            max_rows=8, tokens_per_step=48, max_adapters=3, kv_bytes=24 * PAGE_BYTES, prefix_bytes=8 * PAGE_BYTES
        )
        self.server = Server(load_base(base, device="cpu"), registry, options=options)
        self.engine = self.server.service.engine
        assert self.engine.scheduler.costs is not None
        self.engine.scheduler.costs.price = lambda _: 0.0  # type: ignore[method-assign]  # guess whatever it costs
        self.plain = Plain(base, registry)
        self.chance = random.Random(seed)
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.num_compared = 0
        self._send = self.server.service.loop._send
        self.server.service.loop._send = self._record  # type: ignore[method-assign]

    def _record(self, outputs: list[Any]) -> None:
        for output in outputs:
            if output.sampled is not None:
                self.tokens[output.request_id.partition("-")[0]].append(output.sampled.token)
        self._send(outputs)

    def ask(self, name: str, body: dict[str, Any], leaves_after: int | None) -> None:
        """Send one request; some hang up after so many lines of their stream."""
        headers = {"X-Request-Id": name}
        if not body["stream"]:
            answer = self.server.http.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            self.check(name, body, answer.json()["choices"][0])
            return
        with self.server.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            assert answer.status_code == 200, answer.read()
            for number, _ in enumerate(answer.iter_lines()):
                if number == leaves_after:
                    return

    def check(self, name: str, body: dict[str, Any], choice: dict[str, Any]) -> None:
        """The text is that of the tokens, which end where they should."""
        tokens, ends = self.tokens[name], self.plain.ends(body)
        is_stopped = tokens[-1] in ends
        assert choice["finish_reason"] == ("stop" if is_stopped else "length")
        assert is_stopped or len(tokens) == body["max_tokens"]
        text = self.plain.tokenizer.decode(tokens[:-1] if is_stopped else tokens, skip_special_tokens=True)
        assert choice["text"] == text, body

    def run(self, count: int) -> int:
        """Send `count` requests, a third of them one by one, 8 and 16 at once; how many of their tokens are wrong."""
        wrong = 0
        for concurrency in (1, 8, 16):
            bodies = {f"c{concurrency}n{number}": draw(self.chance) for number in range(-(-count // 3))}
            with ThreadPoolExecutor(concurrency) as threads:
                leaving = {name: self.chance.choice([None, None, None, 0, 3, 20]) for name in bodies}
                asked = [threads.submit(self.ask, name, body, leaving[name]) for name, body in bodies.items()]
                for each in asked:
                    each.result()
            self.server.wait_until_idle()
            for name, body in bodies.items():
                if found := self.plain.differences(body, self.tokens[name]):
                    sys.stderr.write(f"{found} of {len(self.tokens[name])} tokens differ: {body}\n")
                    wrong += found
                self.num_compared += len(self.tokens[name])
            self.tokens.clear()
        return wrong


def test_random_requests(built_base: Path, served_registry: Registry) -> None:
    """Some 20 random requests, with all that could go wrong happening beside them: no token differs."""
    parity = Parity(read_record(built_base), served_registry, seed=7)
    try:
        assert parity.run(21) == 0
        stats = parity.engine.stats
        assert parity.num_compared > 200
        assert stats.num_accepted > 0
        assert stats.num_drafted > stats.num_accepted
        assert stats.num_cached > 0
        assert parity.engine.pages.num_used == 0
        assert not any(parity.engine.pool.users().values())
    finally:
        parity.server.stop()


if __name__ == "__main__":
    from adapterhub_local.base.add import add_base
    from adapterhub_local.settings import home as home_at
    from tests.tiny import save_tiny_model

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = home_at(Path(folder))
        base = add_base("tiny", save_tiny_model(Path(folder) / "model"), place)
        registry = Registry(place)
        publish(registry, "alpha", base, seed=1, rank=8)
        publish(registry, "beta", base, seed=2, rank=3, modules=("q_proj", "v_proj"))
        publish(registry, "gamma", base, seed=3, rank=16, use_rslora=True)
        parity = Parity(base, registry, seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
        wrong = parity.run(int(sys.argv[1]))
        parity.server.stop()
        sys.stdout.write(f"{wrong} of {parity.num_compared} tokens differ; {parity.engine.stats}\n")
        sys.exit(bool(wrong))
