"""Small tasks whose prompts a router can tell apart, their files, and routers made of them."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.registry import Registry
from adapterhub_local.router.train import Trained, train_router
from tests.serve.adapter_makers import publish

TASKS = ("alpha", "beta", "gamma")


def prompts(task: str, count: int, seed: int = 0) -> list[str]:
    """Different prompts: sums, shouted words, or a question about a quiet word."""
    draw = random.Random(f"{task}{seed}")

    def word(letters: str) -> str:
        return "".join(draw.choices(letters, k=draw.randint(3, 9)))

    made = {
        "alpha": lambda: f"{draw.randrange(10**6)} + {draw.randrange(10**6)} = ?",
        "beta": lambda: f"SHOUT: {word('ABCDEFGHIJKLMNOPQRSTUVW')} {word('ABCDEFGHIJKLMNOPQRSTUVW')}",
        "gamma": lambda: f"what is {word('abcdefghijklm')} to {word('nopqrstuvw')}?",
    }[task]
    found: dict[str, None] = {}
    while len(found) < count:
        found[made()] = None
    return list(found)


def write_prompts(path: Path, texts: Sequence[str]) -> Path:
    """A data file with a chat a line."""
    chats = ([{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in texts)
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def make_router(
    registry: Registry, base: BaseInfo, folder: Path, name: str = "router", tasks: Sequence[str] = TASKS, **settings
) -> Trained:
    """A router of random adapters, one a task, which are published if they are not there."""
    for seed, task in enumerate(tasks):
        if task not in registry.names():
            publish(registry, task, base, seed=seed + 1, rank=2 + seed, alias="prod")
    data = {task: [write_prompts(folder / f"{task}.jsonl", prompts(task, 150))] for task in tasks}
    routes = [f"{task}@prod" for task in tasks]
    return train_router(registry, name, routes, **{"data": data, **settings})
