"""`qhub merge`: adapters become one adapter; the exact weighted sum if nothing else is said."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from adapterhub_local.cli.merge_report import tell, tell_modules, warn
from adapterhub_local.cli.output import print_json
from adapterhub_local.registry import Registry

METHODS = (  # the rows of merge.methods, named here so that help loads no torch
    *("weighted_sum", "weighted_average", "task_arithmetic", "slerp", "ties", "dare_linear", "dare_ties", "della"),
    *("magnitude_prune", "breadcrumbs", "knots"),
)
OF_OUTPUT = frozenset(
    ("adapters", "name", "output", "alias", "dry_run", "show_modules", "plot", "as_json", "require", "data", "limit")
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


@click.command(name="merge")
@click.argument("adapters", nargs=-1, required=True)
@click.option("--weights", metavar="W1,W2,...", help="One weight for each adapter; may be negative.")
@click.option("--name", help="Register the result as the next version of NAME.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write one .safetensors file, or else a PEFT folder."
)
@click.option("--alias", help="With --name: alias to point to the new version.")
@click.option("--method", default="weighted_sum", metavar="METHOD", help=f"One of {', '.join(METHODS)}.")
@click.option("--space", metavar="core|full", help="Merge entries of core matrices (default) or of whole ones.")
@click.option("--density", type=float, metavar="D", help="Share of entries that is kept.")
@click.option("--epsilon", type=float, metavar="E", help="della: width of the range of probabilities.")
@click.option("--gamma", type=float, metavar="G", help="breadcrumbs: share of largest entries that is left out.")
@click.option("--scale", type=float, metavar="L", help="Factor of the merged delta (lambda in the papers).")
@click.option("--variant", metavar="mergekit|peft", help="Whose order of election and weighting.")
@click.option("--seed", type=int, help="Seed of what is dropped at random.")
@click.option("--rank", metavar="K|exact|lossless", help="Keep rank K; lossless drops only what is nothing.")
@click.option("--energy", type=float, metavar="SHARE", help="Keep the least rank with this share of the energy.")
@click.option("--max-error", type=float, metavar="E", help="Keep the least rank with this relative error.")
@click.option("--compact", is_flag=True, help="A rank of its own for each module; PEFT reads it, vLLM does not.")
@click.option("--dtype", help="auto (default), float32, float16 or bfloat16: how factors are stored.")
@click.option("--alpha", type=float, help="The alpha of files that do not carry their config.")
@click.option("--with-base", metavar="NAME", help="Make plain adapters of those with DoRA, through this base.")
@click.option("--dora-rank", type=click.IntRange(1), metavar="K", help="Their rank; twice their own if not given.")
@click.option("--force", is_flag=True, help="Merge adapters of different bases; it is recorded.")
@click.option("--require", multiple=True, metavar="TASK.METRIC>=X", help="Keep the merge only if it scores so.")
@click.option(
    "--data", multiple=True, metavar="TASK=FILE", help="JSONL file of held-out chats that a task is scored on."
)
@click.option("--limit", type=click.IntRange(1), help="Score the first so many examples of each task only.")
@click.option("--dry-run", is_flag=True, help="Print the report and write nothing.")
@click.option("--modules", "show_modules", is_flag=True, help="Print the report of every module too.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw error and energy of each module to an .svg file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, every module included.")
def command(
    adapters: tuple[str, ...],
    weights: str | None,
    name: str | None,
    output: Path | None,
    alias: str | None,
    method: str,
    space: str | None,
    density: float | None,
    epsilon: float | None,
    gamma: float | None,
    scale: float | None,
    variant: str | None,
    seed: int | None,
    rank: str | None,
    energy: float | None,
    max_error: float | None,
    compact: bool,
    dtype: str | None,
    alpha: float | None,
    with_base: str | None,
    dora_rank: int | None,
    force: bool,
    require: tuple[str, ...],
    data: tuple[str, ...],
    limit: int | None,
    dry_run: bool,
    show_modules: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Merge ADAPTERS (files, PEFT folders, references or Hub ids) into one, by exact weighted sum or another method.

    \b
    qhub merge a.safetensors b.safetensors --weights 0.7,0.3
    qhub merge sentiment@1 origin@1 --weights 0.7,0.3 --name both
    qhub merge a b --weights 1,1 --rank 16 --dry-run
    qhub merge a b --weights 1,1 --method ties --density 0.2
    qhub merge a b --weights 1,1 --name both --require 'a.exact_match>=0.8' --data a=a.test.jsonl
    qhub merge plan.toml

    Without --name or -o the result is written beside you, as a+b.safetensors.
    """
    from adapterhub_local.durable import check_absent
    from adapterhub_local.errors import InputError
    from adapterhub_local.evaluate.gate import Requirement, judge
    from adapterhub_local.refs import check_alias, check_name, parse_weight

    context = click.get_current_context()
    from_file = len(adapters) == 1 and adapters[0].endswith(".toml")
    if from_file:
        said = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        if other := sorted(said - OF_OUTPUT):
            option = other[0].replace("_", "-")
            raise InputError(f"--{option} is the plan's business: set it in {adapters[0]}, beside the adapters")
    elif weights is None:
        weights_option = next(option for option in context.command.params if option.name == "weights")
        raise click.MissingParameter(ctx=context, param=weights_option)
    parsed = [parse_weight(weight) for weight in (weights or "").split(",")] if not from_file else []
    if name is not None and output is not None:
        raise InputError("--name and -o exclude each other: give one")
    if alias is not None and name is None:
        raise InputError("--alias needs --name: only a registered version can have an alias")
    if dry_run and (name is not None or output is not None):
        raise InputError("--dry-run writes nothing: leave --name and -o out")
    if dry_run and (require or data):
        raise InputError("--require and --data score what is made: leave --dry-run out")
    if limit is not None and not data and not from_file:
        raise InputError("--limit is of the examples that are scored: give --data TASK=FILE")
    requirements, files = [Requirement.parse(text) for text in require], dict(map(_task_and_file, data))
    if name is not None:
        check_name(name)
    if alias is not None:
        check_alias(alias)
    for requirement in requirements if not from_file else ():
        if requirement.task not in files:
            raise InputError(f"{requirement} cannot be checked without data: give --data {requirement.task}=FILE.jsonl")
    if from_file:
        from adapterhub_local.merge.plan_file import load_plan

        written = load_plan(Path(adapters[0]))
        adapters, parsed = written.labels, list(written.weights)
        if name is None and output is None:
            name, alias, output = written.name, written.alias, written.path
    if plot is not None:
        if plot.suffix != ".svg":
            raise InputError(f"{plot} must end in .svg: that is what --plot draws")
        check_absent(plot)
    if name is None and not dry_run:
        stems = [Path(label).name.removesuffix(".safetensors").replace("@", "-") for label in adapters]
        output = check_absent(output or Path("+".join(stems) + ".safetensors"))
    if dora_rank is not None and with_base is None:
        raise InputError("--dora-rank is of adapters converted through their base: give --with-base NAME")
    from adapterhub_local.draw.merge_bars import write_plot
    from adapterhub_local.merge.formula import Formula
    from adapterhub_local.merge.merge import dry_run as merge_dry
    from adapterhub_local.merge.merge import merge_to_path, merge_to_registry
    from adapterhub_local.merge.plan_file import Scored, WrittenPlan
    from adapterhub_local.merge.rank import parse_rule

    registry = Registry()
    if not from_file:
        options: dict[str, Any] = {"density": density, "epsilon": epsilon, "gamma": gamma}
        options |= {"scale": scale, "variant": variant, "seed": seed}
        given = {option: value for option, value in options.items() if value is not None}
        rule = parse_rule(rank, energy, max_error)
        formula = Formula(method, given, space, rule, dtype or "auto", compact)
        alphas = (alpha,) * len(adapters)
        written = WrittenPlan(adapters, tuple(parsed), alphas, formula, force, None, None, None, with_base, dora_rank)
    with opening(written, registry, fetch=not dry_run) as opened:
        plan = opened(written.weights)
        scored = written.evaluate or Scored({})
        requirements += [Requirement.parse(text) for text in scored.require]
        scored = replace(scored, data={**scored.data, **files}, limit=limit or scored.limit)
        is_scored = bool(scored.data or requirements) and not dry_run
        check = judge(plan.base, scored, requirements, registry.home, reporter()) if is_scored else None
        made: dict[str, Any]
        if dry_run:
            report, made = merge_dry(plan).to_json(), {"output": None}
        elif output is not None:
            report, made = merge_to_path(plan, output, judge=check).to_json(), {"output": str(output)}
        else:
            assert name is not None, "there is a name or an output"
            required = {"required": [str(requirement) for requirement in requirements]} if requirements else {}
            version, made_report = merge_to_registry(plan, registry, name, alias=alias, judge=check, note=required)
            report, made = made_report.to_json(), {"reference": str(version), "content_digest": version.content_digest}
    if plot is not None:
        write_plot(report, plot)
    if as_json:
        print_json({**made, **report})
    else:
        tell(next(iter(made.values())) or "dry run, nothing written", len(adapters), report)
        if show_modules:
            tell_modules(report)
    warn(report, parsed)
    if written.with_base and not report.get("conversions"):
        click.echo(f"note: no adapter has DoRA, base '{written.with_base}' was not needed", err=True)
    if written.tune is not None:
        click.echo("note: the weights are those written; `qhub tune-merge` searches them as [tune] says", err=True)


@contextmanager
def opening(written: Any, registry: Registry, *, fetch: bool = True) -> Iterator[Callable[[Sequence[float]], Any]]:
    """A function that makes the plan of a written merge for given weights; what it converts is there in this block.

    References are resolved once; what is on the Hub only is pulled first, unless `fetch` is false.
    """
    from adapterhub_local.base.bases import find_base
    from adapterhub_local.durable import staging
    from adapterhub_local.merge.plan import is_path, make_plan

    options: dict[str, Any] = {"alpha": written.alphas, "force": written.force, "formula": written.formula}
    base = find_base(written.with_base, registry.home) if written.with_base is not None else None
    if len(written.labels) == len(written.weights):  # else refused below, before anything is fetched
        labels = [label if is_path(label) else _resolved(label, registry, fetch) for label in written.labels]
    else:
        labels = list(written.labels)
    if base is None:
        yield lambda weights: make_plan(labels, weights, registry, **options)
        return
    from adapterhub_local.merge.dora import through_base

    with staging(registry.home.tmp) as folder:
        opener = through_base(base, written.dora_rank, folder, force=written.force)
        yield lambda weights: make_plan(labels, weights, registry, opener=opener, **options)


def _resolved(label: str, registry: Registry, fetch: bool) -> str:
    """The exact reference of a version, pulled first if `label` is a Hub id that names none here."""
    from adapterhub_local.errors import BadReference, NotFound

    try:
        return str(registry.resolve(label))
    except (BadReference, NotFound) as error:
        if not HUB_ID.fullmatch(label):
            raise
        if not fetch:
            raise NotFound(
                f"{label} is not here, and a dry run fetches nothing: `qhub pull {label}` if it is a Hub id"
            ) from None
        from adapterhub_local.hub import pull

        repo_id, _, revision = label.partition("@")
        try:
            result = pull(registry, repo_id, revision=revision or None)
        except NotFound as missing:
            raise NotFound(f"{error}. Nor on the Hub: {missing}") from None
        click.echo(f"{result.version} {'pulled' if result.is_new else 'here already'} from {repo_id}", err=True)
        return str(result.version)


def reporter() -> Any:
    """What shows progress: bars on a terminal, else nothing."""
    from adapterhub_local.progress import Quiet, Terminal

    return Terminal() if sys.stderr.isatty() else Quiet()


def _task_and_file(text: str) -> tuple[str, Path]:
    from adapterhub_local.errors import InputError

    task, equals, file = text.partition("=")
    if not task or not equals or not file:
        raise InputError(f"--data is {text[:80]!r}: write a task and its file, such as sentiment=sentiment.test.jsonl")
    return task, Path(file)
