"""Several tokens in one step: two of our servers, one that guesses and one that does not, over HTTP and by turns.

    QHUB_HOME=... python -m benchmarks.speculation [--tokens 96] [--rounds 3] [--together 8]

Greedy answers of the base to tasks over paragraphs of this project's own pages: `copy` asks for the text again,
`change` for the text with a word changed, `json` for facts of it in a JSON schema, `free` for a story, where there is
little to guess. `steps` and `speed` are those with guesses beside those without; `same` is the share of equal answers.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import machine

MODEL = "smollm2"  # the base of QHUB_HOME
CLIENT = httpx.Client(timeout=600, trust_env=False, limits=httpx.Limits(max_connections=64))
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 60},
        "keywords": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 3, "maxItems": 3},
        "is_technical": {"type": "boolean"},
    },
    "required": ["title", "keywords", "is_technical"],
    "additionalProperties": False,
}


def paragraphs(count: int) -> list[str]:
    """Of some 60 words, of the pages of this project."""
    root = Path(__file__).parents[1]
    texts = [each for page in sorted(root.glob("*/*.md")) for each in page.read_text().split("\n\n")]
    plain = [" ".join(each.split()) for each in texts if each[:1].isalpha() and "|" not in each]
    return [each for each in plain if 50 <= len(each.split()) <= 70][:count]


def tasks(texts: list[str], tokens: int) -> dict[str, list[dict[str, Any]]]:
    """Bodies of requests."""
    word = {text: max(text.split(), key=len) for text in texts}
    asked = {
        "copy": [f"Repeat this text word for word.\n\n{text}" for text in texts],
        "change": [f"Repeat this text, but write ORANGE in place of {word[text]}.\n\n{text}" for text in texts],
        "json": [f"Give the facts about this text as JSON.\n\n{text}" for text in texts],
        "free": [f"Write a story about {word[text]}." for text in texts],
    }
    form = {"type": "json_schema", "json_schema": {"name": "facts", "schema": SCHEMA}}
    extra = {"json": {"response_format": form}, "free": {"ignore_eos": True}}
    return {
        task: [
            {
                "model": MODEL, "messages": [{"role": "user", "content": each}], "max_tokens": tokens,
                "temperature": 0, **extra.get(task, {}),
            }
            for each in prompts
        ]
        for task, prompts in asked.items()
    }  # fmt: skip


@contextmanager
def server(speculation: str) -> Iterator[str]:
    """The address of a server of ours that is ready."""
    command = [sys.executable, "-m", "serve", "--port", "0", "--speculation", speculation, "--prefix-cache-mb", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://127[.\d]+:\d+", line)))
            while True:
                try:
                    if CLIENT.get(f"{address}/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.05)
            yield address
        finally:
            process.terminate()


def ask(address: str, bodies: list[dict[str, Any]], together: int) -> tuple[float, int, list[str]]:
    """Tokens a second, steps, and the texts of these requests, so many at once."""

    def one(body: dict[str, Any]) -> tuple[int, str]:
        found = CLIENT.post(f"{address}/v1/chat/completions", json=body).raise_for_status().json()
        return found["usage"]["completion_tokens"], found["choices"][0]["message"]["content"]

    def steps() -> int:
        found = re.search(r"^qhub_engine_steps(?:_total)? (\S+)", CLIENT.get(f"{address}/metrics").text, re.MULTILINE)
        assert found is not None
        return int(float(found[1]))

    before, start = steps(), time.perf_counter()
    with ThreadPoolExecutor(together) as pool:
        answers = list(pool.map(one, bodies))
    took = time.perf_counter() - start
    return sum(count for count, _ in answers) / took, steps() - before, [text for _, text in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 96), ("rounds", 3), ("together", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    work = tasks(paragraphs(options.together), options.tokens)
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        sides = {name: stack.enter_context(server(name)) for name in ("auto", "off")}
        for together in (1, options.together):
            for task, bodies in work.items():
                chosen = bodies if together > 1 else bodies[:3]
                runs: dict[str, list[Any]] = {name: [] for name in sides}
                for turn in range(options.rounds + 1):
                    for name, address in sides.items():
                        run = ask(address, chosen, together)
                        if turn:  # the first round warms up
                            runs[name].append(run)
                speed = {name: statistics.median(each[0] for each in taken) for name, taken in runs.items()}
                steps = {name: statistics.median(each[1] for each in taken) for name, taken in runs.items()}
                pairs = list(zip(runs["auto"][-1][2], runs["off"][-1][2], strict=True))
                found[f"{task}, {together} at once"] = {
                    "tokens_per_second": {name: round(each, 1) for name, each in speed.items()},
                    "speed": round(speed["auto"] / speed["off"], 2),
                    "steps": round(steps["auto"] / steps["off"], 2),
                    "same": sum(one == other for one, other in pairs) / len(pairs),
                }
                print(task, together, json.dumps(found[f"{task}, {together} at once"]), file=sys.stderr)
    print(json.dumps({"speculation": found, "tokens": options.tokens, "machine": machine()}))


if __name__ == "__main__":
    main()
