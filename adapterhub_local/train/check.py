"""What must be so before a run, or every run of a sweep, begins, and needs no torch to be known."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from adapterhub_local.base.bases import BaseInfo, find_base
from adapterhub_local.base.modules import check_patterns, check_targets
from adapterhub_local.base.origin import Origin, belongs
from adapterhub_local.data.dataset import Dataset, read_data
from adapterhub_local.errors import Incompatible, InputError
from adapterhub_local.evaluate.reward_code import check_allowed
from adapterhub_local.lora.config import CONFIG
from adapterhub_local.lora.config_reader import parse_config
from adapterhub_local.recipe import Recipe
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.kinds import check_adapter
from adapterhub_local.registry.protecting import check_reachable
from adapterhub_local.settings import Home

DIVIDES = (2, 13)  # torch from here on divides 4-bit codes: FSDP of 2.11 wants gradients of whatever it divides
Runs = Sequence[tuple[tuple[str, ...], Recipe]]  # of a sweep: what each changes, and its recipe


@contextmanager
def gathering(problems: list[InputError], place: str = "") -> Iterator[None]:
    """Keep the mistakes of a block, behind their place, so that the next is looked for too."""
    try:
        yield
    except InputError as error:
        lines = [f"{place}: {line}" if place else line for line in str(error).splitlines()]
        problems.append(type(error)("\n".join(lines)))


def raise_all(problems: Sequence[InputError]) -> None:
    """Raise one error, of the kind of the first, that says each mistake once, a line each; nothing if there is none."""
    if problems:
        raise type(problems[0])(
            "\n".join(dict.fromkeys(line for error in problems for line in str(error).splitlines()))
        )


def check_run(recipe: Recipe, home: Home) -> tuple[BaseInfo, Version | None]:
    """The base of a recipe, and the version it trains on from.

    Raises InputError (NotFound, Incompatible) with file, line and key of all that does not fit.
    """
    adapter, problems = recipe.adapter, list[InputError]()
    with gathering(problems, recipe.place("output.alias")):
        check_reachable(Registry(home), recipe.output.name, recipe.output.alias)
    info: BaseInfo | None = None
    start: Version | None = None
    with gathering(problems, recipe.place("base.name")):
        info = find_base(recipe.base.name, home)
    if info is not None:
        with gathering(problems, recipe.place("adapter.target_modules")):
            check_targets(info, adapter.target_modules)
        longest, given = recipe.data.max_length, "data.max_length" in recipe.origins
        if given and info.max_length and longest > info.max_length:
            with gathering(problems, f"{recipe.place('data.max_length')} = {longest}"):
                raise InputError(f"base '{info.name}' takes texts of up to {info.max_length} tokens")
        drawn = recipe.reward.max_tokens
        if recipe.train.objective == "grpo" and info.max_length and drawn >= info.max_length:
            with gathering(problems, f"{recipe.place('reward.max_tokens')} = {drawn}"):
                raise InputError(
                    f"base '{info.name}' takes prompt and answer of up to {info.max_length} tokens together"
                )
        if adapter.train_tokens:
            with gathering(problems, recipe.place("adapter.train_tokens")):
                _check_tokens(recipe, info)
        for key in ("rank_pattern", "alpha_pattern") if not problems else ():
            with gathering(problems, recipe.place(f"adapter.{key}")):
                check_patterns(info, adapter.target_modules, getattr(adapter, key) or ())
    if adapter.from_ is not None:
        with gathering(problems, f"{recipe.place('adapter.from')} = '{adapter.from_}'"):
            start = check_adapter(Registry(home).resolve(adapter.from_))
            if info is not None:
                _check_start(start, info)
        if start is not None:
            _check_kept(start, recipe, problems)
    raise_all(problems)
    assert info is not None, "a base that is not there is a problem"
    return info, start


def _check_tokens(recipe: Recipe, info: BaseInfo) -> None:
    """Raise InputError for tokens that are not the base's, and for a base whose rows PEFT would compute otherwise."""
    from adapterhub_local.base.vocabulary import Vocabulary  # loads torch, as the run will
    from adapterhub_local.train.tokens import embedding_rows, ids_of, load_tokenizer

    ids_of(recipe.adapter.train_tokens or (), load_tokenizer(info), embedding_rows(info), info.name)
    vocabulary = Vocabulary.of_base(info)
    if vocabulary.is_tied and vocabulary.head_has_bias:
        raise InputError(f"the head of base '{info.name}' has a bias, which PEFT leaves out where rows are trained")


def _check_start(start: Version, info: BaseInfo) -> None:
    answer = belongs(Origin(start.base_fingerprint), info)
    if answer.level != "exact":
        reason = answer.reason if start.base_fingerprint else f"made for another base (unknown), not for {info.name}"
        raise Incompatible(f"{start} was {reason}")


def _check_kept(start: Version, recipe: Recipe, problems: list[InputError]) -> None:
    """What a recipe asks for must be what the version it trains on from has, and keeps."""
    config = parse_config((start.path / CONFIG).read_bytes(), str(start), dora=True, tokens=True)
    kept = {"rank": config.rank, "alpha": config.alpha, "rslora": config.use_rslora, "dora": config.use_dora}
    for key, value in kept.items():
        asked = getattr(recipe.adapter, key)
        if f"adapter.{key}" in recipe.origins and asked != value:
            with gathering(problems, f"{recipe.place(f'adapter.{key}')} = {json.dumps(asked)}"):
                raise InputError(f"{start} has {json.dumps(value)}, and continued training keeps it: leave {key} out")
    if recipe.adapter.train_tokens:
        with gathering(problems, recipe.place("adapter.train_tokens")):
            had = f"rows of {len(ids)} tokens" if (ids := set().union(*config.tokens.values())) else "no rows of tokens"
            raise InputError(f"{start} has {had}, and continued training keeps that: leave train_tokens out")


def check_code(recipe: Recipe) -> None:
    """Raise InputError where a run would run Python code of the recipe, and that was not allowed."""
    problems = list[InputError]()
    with gathering(problems, recipe.place("reward.python")):
        check_allowed(recipe.reward)
    raise_all(problems)


def check_processes(recipe: Recipe, count: int, *, shard_base: bool) -> None:
    """Raise InputError for what `count` processes cannot train together, or with the base divided between them."""
    if shard_base and count == 1:
        raise InputError(
            "--shard-base divides the base between processes, and there is one: add --nproc 2, or start several by "
            "torchrun"
        )
    if shard_base and not divides():
        raise InputError(
            f"--shard-base needs torch {'.'.join(map(str, DIVIDES))} or newer, and here is {version('torch')}: "
            "update it, or leave --shard-base out"
        )
    adapter, is_drawn = recipe.adapter, recipe.train.objective == "grpo"
    for key, is_wanted, why in (
        ("train.objective", count > 1 and is_drawn,
         "grpo draws its answers in one process: leave out --nproc and torchrun"),
        ("adapter.init", shard_base and adapter.init == "eva",
         "EVA looks at what goes through the whole base before it is divided: leave it or --shard-base out"),
        ("adapter.dora", shard_base and adapter.dora,
         "DoRA measures the whole weights in every pass: leave it or --shard-base out"),
    ):  # fmt: skip
        if is_wanted:
            raise InputError(f"{recipe.place(key)}: {why}")


def divides() -> bool:
    """Whether this torch can divide a base between processes."""
    return tuple(int(part) for part in version("torch").split(".")[:2]) >= DIVIDES


def check_runs(runs: Runs, home: Home) -> None:
    """`check_run` of each. Raises InputError with what does not fit in any of them."""
    problems: list[InputError] = []
    for _, run in runs:
        with gathering(problems):
            check_run(run, home)
    raise_all(problems)


def data_of(recipe: Recipe) -> Any:
    """What decides a recipe's examples: equal for runs that have the same."""
    return recipe.data, recipe.eval.limit


def read_all(runs: Runs) -> dict[Any, Dataset]:
    """The data of every run, by `data_of`, each read once. Raises InputError with what is wrong in any of them."""
    datasets: dict[Any, Dataset] = {}
    problems: list[InputError] = []
    for which, run in {data_of(run): run for _, run in runs}.items():
        with gathering(problems):
            datasets[which] = read_data(run)
    raise_all(problems)
    return datasets


def check_comparable(recipe: Recipe, datasets: Iterable[Dataset]) -> None:
    """Raises InputError if the runs of a sweep have nothing held out to choose by, or not the same."""
    digests = {dataset.test_digest for dataset in datasets}
    if None in digests or len(digests) > 1:
        raise InputError(
            f"{recipe.path}: a sweep chooses by examples that are held out, the same for all runs: "
            + ("set data.test or data.test_share" if None in digests else "set data.test")
        )
