"""The load generator: who is asked, what is measured, and the whole command against a real server."""

import itertools
import json
import random
import subprocess
import sys
from collections import Counter

import pytest

from serve.bench import Load, Sample, report, spread
from tests.patience import PATIENCE
from tests.serve.conftest import Server

MODELS = ["a", "b", "c", "d"]


def asked(popularity: str, count: int = 4000) -> Counter:
    """How often each model is asked."""
    return Counter(itertools.islice(spread(MODELS, popularity, 1.5, random.Random(1)), count))


def test_spread() -> None:
    """Distinct by turns, uniform alike, skewed by Zipf's law, identical one alone."""
    assert asked("distinct", 8) == Counter(dict.fromkeys(MODELS, 2))
    assert asked("identical") == {"a": 4000}
    assert all(abs(count - 1000) < 150 for count in asked("uniform").values())
    weights = [place**-1.5 for place in (1, 2, 3, 4)]
    for model, weight in zip(MODELS, weights, strict=True):
        assert asked("skewed")[model] == pytest.approx(4000 * weight / sum(weights), abs=150)


def test_report() -> None:
    """Times, rates and errors follow their definitions; failed requests count as errors alone."""
    samples = [Sample("a", 0.1 * n, 0.1 * n + 0.9, 5, 10) for n in range(1, 11)]
    samples += [Sample("b", None, 1.0, error="429")]
    result = report(Load(MODELS, "uniform", 1.5, 11, 2, None, 1, 10, True, 0), samples, 2.0)
    assert result["tokens_per_second"] == 50
    assert result["requests_per_second"] == 5
    assert result["first_token_ms"] == {"mean": 550, "p50": 500, "p90": 900, "p99": 1000, "max": 1000}
    assert result["per_token_ms"]["p99"] == pytest.approx(100)
    assert result["errors"] == {"429": 1}
    assert set(result["adapters"]) == {"a"}


@pytest.mark.parametrize("loop", [["--concurrency", "4"], ["--rate", "50"]])
def test_against_a_server(server: Server, loop: list[str]) -> None:
    """The command asks each model in turn, closed or open loop, and its last line is one JSON document."""
    arguments = ["--url", f"{server.url}/v1", "--requests", "9", "--max-tokens", "5", "--prompt-words", "2"]
    arguments += ["--models", "alpha,beta,tiny", "--popularity", "distinct", "--warmup", "1"]
    command = [sys.executable, "-m", "serve.bench", *arguments, *loop]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["errors"] == {}
    assert result["completion_tokens"] == 45
    tokens = {name: one["completion_tokens"] for name, one in result["adapters"].items()}
    assert tokens == {"alpha": 15, "beta": 15, "tiny": 15}
    assert 0 < result["first_token_ms"]["p50"] <= result["request_ms"]["p50"]


def test_nobody_there() -> None:
    """Without a server one line says so."""
    command = [sys.executable, "-m", "serve.bench", "--url", "http://127.0.0.1:9/v1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert "does not list its models" in done.stderr
    assert "Traceback" not in done.stderr
