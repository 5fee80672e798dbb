"""One person at the keyboard: our server beside llama.cpp's, on the same GGUF file, over HTTP.

    QHUB_HOME=... python -m benchmarks.alone [--prompt 64] [--tokens 48] [--rounds 4] [--together 16] [--dtype bfloat16]

Greedy answers of one length to random prompts of one length, from one request at a time and from several at once.
Both servers are up and asked by turns, each with all cores. Answers to random prompts repeat themselves, which is
easy to guess: `--speculation auto` is not what a real text gets (benchmarks.speculation). Ours computes the base from
NF4 in float32 or bfloat16, llama.cpp from the file's own 4-bit format in its own arithmetic: speeds are compared, not
answers.
Needs `pip install xllamacpp`.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from benchmarks.machine import machine
from examples.demo import demo_base

MODEL = "smollm2"  # the base of QHUB_HOME
CLIENT = httpx.Client(timeout=600, trust_env=False, limits=httpx.Limits(max_connections=64))


def llama_cpp(options: argparse.Namespace) -> None:
    """llama.cpp's server until standard input ends; prints its address."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(demo_base())
    params.n_parallel = options.together
    params.n_ctx = options.together * 256
    params.cpuparams.n_threads = os.cpu_count() or 1
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


def ask_ours(address: str, prompt: list[int], tokens: int) -> int:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    found = CLIENT.post(f"{address}/v1/completions", json=body).raise_for_status().json()
    count: int = found["usage"]["completion_tokens"]
    return count


def ask_llama_cpp(address: str, prompt: list[int], tokens: int) -> int:
    body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    count: int = CLIENT.post(f"{address}/completion", json=body).raise_for_status().json()["tokens_predicted"]
    return count


def speed(ask: Any, address: str, texts: list[list[int]], tokens: int) -> float:
    """Tokens of answers a second, prompts included in the time, of requests sent at once."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(texts)) as pool:
        count = sum(pool.map(lambda text: ask(address, text, tokens), texts))
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("llama.cpp",))
    parser.add_argument("--speculation", choices=("auto", "off"), default="off", help="as of our server")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="as of our server")
    for name, value in (("prompt", 64), ("tokens", 48), ("rounds", 4), ("together", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if options.side:
        llama_cpp(options)
        return
    start = time.perf_counter()
    log = subprocess.PIPE
    ours = subprocess.Popen(
        [sys.executable, "-m", "serve", "--port", "0", "--speculation", options.speculation, "--dtype", options.dtype],
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ours.stdout is not None
    address = next(found[0] for line in ours.stdout if (found := re.search(r"http://127[.\d]+:\d+", line)))
    while True:
        try:
            if CLIENT.get(f"{address}/ready").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.05)
    ready = time.perf_counter() - start
    theirs = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.alone", "--side", "llama.cpp", "--together", str(options.together)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert theirs.stdout is not None
    other = theirs.stdout.readline().strip()
    sides = {"ours": (ask_ours, address), "llama_cpp": (ask_llama_cpp, other)}
    found: dict[str, dict[int, list[float]]] = {side: {1: [], options.together: []} for side in sides}
    try:
        for number in range(options.rounds + 1):
            for count in (1, options.together):
                for side, (ask, place) in sides.items():
                    draw = random.Random(f"{number} {count}")
                    texts = [draw.choices(range(100, 49000), k=options.prompt) for _ in range(count)]
                    took = speed(ask, place, texts, options.tokens)
                    if number:  # the first round warms up
                        found[side][count].append(took)
                        print(f"{side}, {count} at once: {took:.1f} tokens/s", file=sys.stderr)
    finally:
        ours.terminate()
        theirs.terminate()
    result = {
        side: {str(count): round(statistics.median(each), 1) for count, each in counts.items()}
        for side, counts in found.items()
    }
    print(
        json.dumps(
            {
                "tokens_per_second": result,
                "ready_seconds": round(ready, 2),
                "speculation": options.speculation,
                "dtype": options.dtype,
                "machine": machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
