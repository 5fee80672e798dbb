"""`python -m serve.bench`: load for any OpenAI server, with requests spread over adapters; the last line is JSON.

Closed loop: this many clients, each asks again when it was answered. Open loop: requests come at a rate, whether
the server keeps up or not, and times count from when a request was due.
"""

import asyncio
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

from adapterhub_local import settings
from adapterhub_local.client import bearer
from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.visible import visible

POPULARITY = ("distinct", "uniform", "skewed", "identical")  # the four of Punica, arXiv 2310.18547
WORDS = ("time", "year", "people", "way", "day", "thing", "life", "child", "world", "school", "state", "group", "house")


@dataclass(frozen=True)
class Load:
    """What is asked, of whom, and how fast. `rate` in requests a second, None for a closed loop."""

    models: Sequence[str]
    popularity: str
    zipf: float
    num_requests: int
    concurrency: int
    rate: float | None
    prompt_words: int
    max_tokens: int
    ignore_eos: bool
    seed: int


@dataclass(frozen=True)
class Sample:
    """One request: seconds to the first token and to the last, tokens, or what went wrong."""

    model: str
    first: float | None
    last: float
    num_prompt: int = 0
    num_tokens: int = 0
    error: str | None = None

    @property
    def per_token(self) -> float | None:
        """Seconds between tokens."""
        return (self.last - self.first) / (self.num_tokens - 1) if self.first and self.num_tokens > 1 else None


def spread(models: Sequence[str], popularity: str, zipf: float, rng: random.Random) -> Iterator[str]:
    """Who is asked, without end.

    distinct: each model by turns; uniform: at random, all alike; skewed: the k-th model with weight k^-zipf;
    identical: the first alone.
    """
    match popularity:
        case "distinct":
            yield from itertools.cycle(models)
        case "identical":
            yield from itertools.repeat(models[0])
    weights = [(place + 1) ** -zipf if popularity == "skewed" else 1.0 for place in range(len(models))]
    while True:
        yield rng.choices(models, weights)[0]


async def run(client: Any, load: Load) -> tuple[list[Sample], float]:
    """Every sample of a load, and the seconds that all took."""
    rng = random.Random(load.seed)  # noqa: S311 - a workload, nothing secret
    bodies = list(itertools.islice(_bodies(load, rng), load.num_requests))
    start = time.perf_counter()
    if load.rate is not None:
        due = list(itertools.accumulate(rng.expovariate(load.rate) for _ in bodies))
        samples = await asyncio.gather(
            *(_ask_at(client, body, start + after) for body, after in zip(bodies, due, strict=True))
        )
        return list(samples), time.perf_counter() - start
    samples = []
    left = iter(bodies)

    async def work() -> None:
        for body in left:
            samples.append(await _ask(client, body, time.perf_counter()))

    await asyncio.gather(*(work() for _ in range(load.concurrency)))
    return samples, time.perf_counter() - start


def _bodies(load: Load, rng: random.Random) -> Iterator[dict[str, Any]]:
    for model in spread(load.models, load.popularity, load.zipf, rng):
        # each prompt begins differently, so that no cache of prefixes answers for the model
        prompt = " ".join([str(rng.randrange(10**6)), *rng.choices(WORDS, k=load.prompt_words)])
        body = {"model": model, "prompt": prompt, "max_tokens": load.max_tokens, "temperature": 0}
        extra = {"ignore_eos": True} if load.ignore_eos else {}
        yield {**body, **extra, "stream": True, "stream_options": {"include_usage": True}}


async def _ask_at(client: Any, body: dict[str, Any], due: float) -> Sample:
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return await _ask(client, body, due)


async def _ask(client: Any, body: dict[str, Any], start: float) -> Sample:
    import httpx

    usage: dict[str, int] = {}
    first, last, num_chunks = None, 0.0, 0
    try:
        async with client.stream("POST", "/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return Sample(body["model"], None, time.perf_counter() - start, error=str(response.status_code))
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return Sample(body["model"], first, time.perf_counter() - start, error="stream")
                usage = chunk.get("usage") or usage
                if chunk.get("choices"):
                    num_chunks += 1
                    last = time.perf_counter() - start
                    first = first or last
    except (httpx.HTTPError, ValueError) as error:
        return Sample(body["model"], first, time.perf_counter() - start, error=type(error).__name__)
    if first is None:
        return Sample(body["model"], None, time.perf_counter() - start, error="empty")
    num_tokens = usage.get("completion_tokens", num_chunks)
    return Sample(body["model"], first, last, usage.get("prompt_tokens", 0), num_tokens)


def report(load: Load, samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """What was seen, in milliseconds and tokens a second, for all and for each model."""
    good = [sample for sample in samples if sample.error is None]
    by_model: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in good:
        by_model[sample.model].append(sample)
    return {
        "load": {**vars(load), "models": len(load.models), "loop": "closed" if load.rate is None else "open"},
        "seconds": round(seconds, 3),
        "requests": len(samples),
        "errors": dict(Counter(sample.error for sample in samples if sample.error is not None)),
        "requests_per_second": round(len(good) / seconds, 2),
        "tokens_per_second": round(sum(sample.num_tokens for sample in good) / seconds, 1),
        "prompt_tokens": sum(sample.num_prompt for sample in good),
        "completion_tokens": sum(sample.num_tokens for sample in good),
        "first_token_ms": _quantiles([sample.first for sample in good if sample.first is not None]),
        "per_token_ms": _quantiles([sample.per_token for sample in good if sample.per_token is not None]),
        "request_ms": _quantiles([sample.last for sample in good]),
        "adapters": {
            model: {
                "requests": len(own),
                "completion_tokens": sum(sample.num_tokens for sample in own),
                "first_token_ms": _quantiles([sample.first for sample in own if sample.first is not None]),
                "per_token_ms": _quantiles([sample.per_token for sample in own if sample.per_token is not None]),
            }
            for model, own in sorted(by_model.items())
        },
    }


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, median, 90 and 99 per cent, and largest, of seconds in milliseconds (nearest rank)."""
    if not values:
        return None
    ranked = sorted(values)
    found = {f"p{share}": ranked[max(0, math.ceil(share / 100 * len(ranked)) - 1)] for share in (50, 90, 99)}
    named = {"mean": statistics.fmean(ranked), **found, "max": ranked[-1]}
    return {name: round(value * 1000, 2) for name, value in named.items()}


async def _measure(url: str, load: Load, models: str | None, warmup: int) -> dict[str, Any]:
    import httpx

    headers = bearer(settings.api_key())
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url.rstrip("/"), headers=headers, timeout=600, limits=limits, trust_env=False
    ) as client:
        chosen = models.split(",") if models else await _adapters(client, url)
        load = Load(**{**vars(load), "models": chosen})
        if warmup:
            await run(client, Load(**{**vars(load), "num_requests": warmup, "rate": None, "seed": load.seed + 1}))
        samples, seconds = await run(client, load)
    return report(load, samples, seconds)


async def _adapters(client: Any, url: str) -> list[str]:
    """The names that the server adds to its base; if there are none, all that it lists."""
    import httpx

    try:
        listed = (await client.get("/models")).raise_for_status().json()["data"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise QhubError(f"{url} does not list its models ({type(error).__name__}): is a server there?") from None
    names = [model["id"] for model in listed if model.get("parent") and "@" not in model["id"]]
    return names or [model["id"] for model in listed]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--url", default="http://127.0.0.1:8000/v1", help="The server. QHUB_API_KEY is its key.")
@click.option("--models", metavar="A,B,...", help="Whom to ask. Default: every adapter that the server lists.")
@click.option("--popularity", type=click.Choice(POPULARITY), default="uniform", help="How requests are spread.")
@click.option("--zipf", type=click.FloatRange(0), default=1.5, help="Exponent of popularity skewed.")
@click.option("--requests", "num_requests", type=click.IntRange(1), default=64, help="How many.")
@click.option("--concurrency", type=click.IntRange(1), default=16, help="Closed loop: clients.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Open loop: requests a second (Poisson).")
@click.option("--prompt-words", type=click.IntRange(0), default=32, help="Words of each prompt.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, help="Tokens of each answer.")
@click.option(
    "--ignore-eos/--stop-at-eos", default=True, help="Whether all answers have that length (not OpenAI's own)."
)
@click.option("--warmup", type=click.IntRange(0), default=8, help="Requests of the warm-up.")
@click.option("--seed", default=0, help="Seed of prompts and spread.")
def command(url: str, models: str | None, warmup: int, **settings_of_load: Any) -> None:
    """Load a server and say how it did."""
    result = asyncio.run(_measure(url, Load(models=(), **settings_of_load), models, warmup))
    for name in ("requests_per_second", "tokens_per_second", "first_token_ms", "per_token_ms", "request_ms", "errors"):
        click.echo(f"{name:<20} {result[name]}")
    click.echo(json.dumps(result))
    if len(result["errors"]) and not result["completion_tokens"]:
        raise InputError(f"no request was answered: {result['errors']}")


if __name__ == "__main__":
    try:
        command()
    except QhubError as error:
        click.echo(visible(f"serve.bench: {error}"), err=True)
        sys.exit(error.exit_code)
