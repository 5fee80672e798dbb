"""What the verbs do, as functions: train, merge, evaluate, serve, push, pull. `adapterhub_local` lists them.

Each works in the home at $QHUB_HOME, or in that of the registry it is given, and raises a QhubError that says what to
do. What is heavy is imported when a function is called.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_local.errors import InputError
from adapterhub_local.progress import Reporter
from adapterhub_local.recipe import Recipe, load_recipe
from adapterhub_local.registry import Registry, Version
from adapterhub_local.settings import home

if TYPE_CHECKING:
    from fastapi import FastAPI

    from adapterhub_local.evaluate.comparison import Comparison
    from adapterhub_local.evaluate.merging import Merged
    from adapterhub_local.hub import PullResult, PushResult


def train_recipe(
    recipe: Recipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    restart: bool = False,
    reporter: Reporter | None = None,
) -> Version:
    """Train the adapter that a recipe describes, evaluate it beside its base, and register it: `qhub train`.

    >>> version = train_recipe("recipes/sentiment.toml", overrides=["train.epochs=2"])
    >>> version.lineage["metrics"]["sentiment"]["adapter"]["exact_match"]
    0.895

    `overrides` change keys of a recipe that is given as a file. `resume` continues the stopped run of the recipe,
    `restart` throws it away. Raises BadRecipe, BadData, Incompatible and NotFound before anything is written.
    """
    from adapterhub_local.train.train import train

    if isinstance(recipe, Recipe):
        if overrides:
            raise InputError("overrides are for a recipe that is given as a file: load it with them")
        loaded = recipe
    else:
        loaded = load_recipe(Path(recipe), overrides)
    if loaded.sweep is not None:
        raise InputError(f"{loaded.path} has [sweep]: train it with `qhub train`, or one run of `load_runs`")
    return train(loaded, home(), resume=resume, restart=restart, reporter=reporter)


def merge_adapters(
    adapters: Sequence[str | Path],
    weights: Sequence[float],
    *,
    name: str | None = None,
    alias: str | None = None,
    output: str | Path | None = None,
    dry_run: bool = False,
    method: str = "weighted_sum",
    space: str | None = None,
    rank: int | str | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    max_size: str | int | None = None,
    dtype: str = "auto",
    compact: bool = False,
    alpha: float | None = None,
    with_base: str | None = None,
    force: bool = False,
    registry: Registry | None = None,
    **parameters: Any,
) -> "Merged":
    """Merge adapters - files, PEFT folders, references, Hub ids - into one, every loss measured: `qhub merge`.

    >>> merged = merge_adapters(["sentiment@1", "origin@1"], [0.7, 0.3], name="both")
    >>> merged.version, merged.report.relative_error
    (both@1, 1.8e-08)

    One of `name`, `output` and `dry_run` says where the result goes. `parameters` are those of the method, such as
    density=0.2 with method="ties"; `rank`, `energy`, `max_error` or `max_size` say what is kept. Raises InputError
    for what does not fit together, Incompatible for adapters of different bases, unless `force`.
    """
    from adapterhub_local.evaluate.merging import carry_out
    from adapterhub_local.merge.destination import Destination
    from adapterhub_local.merge.formula import Formula
    from adapterhub_local.merge.plan_file import WrittenPlan
    from adapterhub_local.merge.rank_rule import parse_rule

    there = Destination(name, alias, None if output is None else Path(output))
    if there.is_given is dry_run:
        raise InputError("give one of name, output and dry_run: where the merge goes")
    labels = tuple(str(label) for label in adapters)
    if not dry_run:
        there = there.beside(labels)
    formula = Formula(method, parameters, space, parse_rule(rank, energy, max_error, max_size), dtype, compact)
    written = WrittenPlan(
        labels, tuple(weights), (alpha,) * len(labels), formula, force, there.name, there.alias, there.path, with_base
    )
    return carry_out(written, registry or Registry(), dry_run=dry_run)


def evaluate_adapters(
    references: str | Sequence[str],
    data: str | Path,
    *,
    against: Sequence[str] = (),
    registry: Registry | None = None,
    **options: Any,
) -> "Comparison":
    """Score adapters and bases on held-out data, compare them, and keep the scores: `qhub eval`.

    >>> done = evaluate_adapters("sentiment@prod", "sentiment.test.jsonl", against=["base"])
    >>> done.scores["sentiment@prod"].exact_match, done.kept["sentiment@prod"]["base"]["difference"]
    (0.895, {...})

    `against` names adapters, bases, or `base` for their own. `options` are those of `evaluate.comparison.compare`:
    task, choices, regex, json_valid, tool_calls, rewards, limit, batch_size, max_length, template, prompt, answer,
    format.
    """
    from adapterhub_local.evaluate.comparison import compare, what_to_score

    registry = registry or Registry()
    named = (references,) if isinstance(references, str) else tuple(references)
    return compare(what_to_score(named, against, registry), str(data), registry, **options)


def create_app(
    base: str | None = None,
    *,
    registry: Registry | None = None,
    device: str | None = None,
    **options: Any,
) -> "FastAPI":
    """The ASGI application that serves a base and its adapters, OpenAI-compatible: `qhub serve`.

    >>> app = create_app("smollm2", max_rows=8, timeout=60.0)
    >>> uvicorn.run(app, host="127.0.0.1", port=8000)

    `base` may be left out where there is one only. `options` are fields of EngineOptions and HttpOptions. Raises
    NotFound for a base that is not here, InputError for an unknown option, or a value that it cannot have.
    """
    from dataclasses import fields

    from adapterhub_local.base.bases import choose_base
    from adapterhub_local.base.load import choose_device, load_base
    from serve.engine.options import EngineOptions
    from serve.http.app import create_app as application
    from serve.options import HttpOptions

    engine_names, http_names = ({item.name for item in fields(table)} for table in (EngineOptions, HttpOptions))
    if unknown := sorted(options.keys() - engine_names - http_names):
        raise InputError(
            f"there is no option {', '.join(unknown)}: known are {', '.join(sorted(engine_names | http_names))}"
        )
    registry = registry or Registry()
    engine = EngineOptions.on(
        choose_device(device), **{name: value for name, value in options.items() if name in engine_names}
    )
    http = HttpOptions(**{name: value for name, value in options.items() if name in http_names})
    info = choose_base(base, registry.home, "the server")
    return application(load_base(info, device=device), registry=registry, options=engine, http=http)


def push_adapter(reference: str, repo_id: str, *, registry: Registry | None = None, **options: Any) -> "PushResult":
    """Publish a version on the Hugging Face Hub: one commit, and the tag v<number>: `qhub push`.

    >>> push_adapter("sentiment@1", "you/sentiment-lora", private=True).url
    'https://huggingface.co/you/sentiment-lora'

    `options` are those of `hub.push`: base_id, private, aliases, pull_request, licence, token, endpoint.
    """
    from adapterhub_local.hub import push

    return push(registry or Registry(), reference, repo_id, **options)


def pull_adapter(repo_id: str, *, registry: Registry | None = None, **options: Any) -> "PullResult":
    """Register an adapter of the Hugging Face Hub, after checking every byte: `qhub pull`.

    >>> pull_adapter("you/sentiment-lora", revision="v1").version
    sentiment-lora@1

    `options` are those of `hub.pull`: revision, name, base, trusted, token, endpoint.
    """
    from adapterhub_local.hub import pull

    return pull(registry or Registry(), repo_id, **options)
