"""`qhub merge`: adapters become one adapter; by exact weighted sum, or as another method has it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from adapterhub_local.cli.merge_report import print_by_rank, print_modules, print_report, warn
from adapterhub_local.cli.output import echo, print_json, reporter
from adapterhub_local.errors import InputError
from adapterhub_local.merge.layers import Weight
from adapterhub_local.merge.methods import METHODS, parameters
from adapterhub_local.merge.plan_file import WrittenPlan, load_plan
from adapterhub_local.merge.tuning import Scored
from adapterhub_local.registry import Registry

# what may be given beside a plan file; all else is the plan's
OF_OUTPUT = frozenset(
    (
        "adapters",
        "name",
        "output",
        "alias",
        "dry_run",
        "by_rank",
        "show_modules",
        "plot",
        "as_json",
        "require",
        "data",
        "limit",
    )
)


def _parameter_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """An option for every parameter of the methods, with what each takes if it is not given."""
    for name, rows in reversed(parameters().items()):
        one = next(iter(rows.values()))
        defaults: dict[Any, list[str]] = {}
        for method, row in rows.items():
            defaults.setdefault(row.default, []).append(method)
        shown = "; ".join(f"{default} for {', '.join(methods)}" for default, methods in defaults.items())
        function = click.option(
            f"--{name.replace('_', '-')}",
            name,
            type=one.kind,
            metavar="|".join(one.choices) or one.letter,
            help=f"{one.help} Default: {shown}.",
        )(function)
    return function


@click.command(name="merge")
@click.argument("adapters", nargs=-1, required=True)
@click.option(
    "--weights",
    metavar="W1,W2,...",
    help="One weight for each adapter; may be negative. 1/0.5: one for each group of layers.",
)
@click.option("--name", help="Register the result as the next version of NAME.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write one .safetensors file, or else a PEFT folder."
)
@click.option("--alias", help="With --name: alias to point to the new version.")
@click.option("--method", default="weighted_sum", metavar="METHOD", help=f"One of {', '.join(METHODS)}.")
@click.option("--space", metavar="core|full", help="Merge entries of core matrices (default) or of whole ones.")
@_parameter_options
@click.option(
    "--rank",
    metavar="K|auto|exact|lossless",
    help="Keep rank K; lossless drops only what is zero; auto (default) is exact up to rank 512, and 512 above.",
)
@click.option("--energy", type=float, metavar="SHARE", help="Keep the least rank with this share of the energy.")
@click.option("--max-error", type=float, metavar="E", help="Keep the least rank with this relative error.")
@click.option("--max-size", metavar="SIZE", help="Keep the rank that fits in this size, such as 50MB.")
@click.option("--compact", is_flag=True, help="A rank of its own for each module; PEFT reads it, vLLM does not.")
@click.option("--dtype", help="auto (default), float32, float16 or bfloat16: how factors are stored.")
@click.option("--alpha", type=float, help="The alpha of files that do not carry their config.")
@click.option("--with-base", metavar="NAME", help="Make plain adapters of those with DoRA, through this base.")
@click.option("--dora-rank", type=click.IntRange(1), metavar="K", help="Their rank; twice their own if not given.")
@click.option("--force", is_flag=True, help="Merge adapters of different bases; it is recorded.")
@click.option("--require", multiple=True, metavar="TASK.METRIC>=X", help="Keep the merge only if it meets this bound.")
@click.option(
    "--data", multiple=True, metavar="TASK=FILE", help="JSONL file of held-out chats that a task is scored on."
)
@click.option("--limit", type=click.IntRange(1), help="Score at most this many examples of each task.")
@click.option("--dry-run", is_flag=True, help="Print the report and write nothing.")
@click.option("--by-rank", is_flag=True, help="With --dry-run: print the error at every rank there is, too.")
@click.option("--modules", "show_modules", is_flag=True, help="Print the report of every module too.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw error and energy of each module to an .svg file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, every module included.")
def command(
    adapters: tuple[str, ...], dry_run: bool, by_rank: bool, show_modules: bool, plot: Path | None, as_json: bool,
    **given: Any,
) -> None:  # fmt: skip
    """Merge ADAPTERS (files, PEFT folders, references or Hub ids) into one, by exact weighted sum or another method.

    \b
    qhub merge a.safetensors b.safetensors --weights 0.7,0.3
    qhub merge sentiment@1 origin@1 --weights 0.7,0.3 --name both
    qhub merge a b --weights 1,1 --rank 16 --dry-run
    qhub merge a b --weights 1,1 --method ties --density 0.2
    qhub merge a b --weights 1,1 --name both --require 'a.exact_match>=0.8' --data a=a.test.jsonl
    qhub merge plan.toml

    Without --name or -o the result is written to this folder, as a+b.safetensors.
    """
    written = _from_file(Path(adapters[0])) if _is_plan(adapters) else _from_options(adapters, given)
    written = _put_where(_scored_on(written, given, adapters, dry_run), given, dry_run)
    if by_rank and not dry_run:
        raise InputError("--by-rank says what a rank would lose before one is chosen: add --dry-run")
    if plot is not None:
        from adapterhub_local.draw.merge_bars import check_plot, write_plot

        check_plot(plot)
    from adapterhub_local.evaluate.merging import carry_out

    merged = carry_out(written, Registry(), dry_run=dry_run, by_rank=by_rank, reporter=reporter(), note=_note)
    report = merged.report.to_json()
    if plot is not None:
        write_plot(report, plot)
    if as_json:
        print_json({**merged.to_json(), **report})
    else:
        print_report(str(merged.version or merged.path or "dry run, nothing written"), len(written.labels), report)
        if merged.by_rank is not None:
            print_by_rank(merged.by_rank)
        if show_modules:
            print_modules(report)
    warn(report, list(written.weights))
    if written.with_base and not report.get("conversions"):
        _note(f"note: no adapter has DoRA, base '{written.with_base}' was not needed")
    if written.tune is not None:
        _note("note: the weights are those written; `qhub tune-merge` searches them as [tune] says")


def _note(text: str) -> None:
    echo(text, err=True)


def _is_plan(adapters: tuple[str, ...]) -> bool:
    return len(adapters) == 1 and adapters[0].endswith(".toml")


def _from_file(path: Path) -> WrittenPlan:
    """The plan at `path`, whose business all is but where the result goes and what it is scored on."""
    context = click.get_current_context()
    named = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if other := sorted(named - OF_OUTPUT):
        option = other[0].replace("_", "-")
        raise InputError(f"--{option} belongs in the plan: set it in {path}, beside the adapters")
    return load_plan(path)


def _from_options(adapters: tuple[str, ...], given: dict[str, Any]) -> WrittenPlan:
    from adapterhub_local.merge.formula import Formula
    from adapterhub_local.merge.rank_rule import parse_rule

    if given["weights"] is None:
        context = click.get_current_context()
        raise click.MissingParameter(
            ctx=context, param=next(option for option in context.command.params if option.name == "weights")
        )
    weights = tuple(_weight(weight) for weight in given["weights"].split(","))
    if given["limit"] is not None and not given["data"]:
        raise InputError("--limit counts examples that are scored: give --data TASK=FILE")
    if given["dora_rank"] is not None and given["with_base"] is None:
        raise InputError("--dora-rank is for adapters converted through their base: give --with-base NAME")
    formula = Formula(
        given["method"],
        {name: given[name] for name in parameters() if given[name] is not None},
        given["space"],
        parse_rule(given["rank"], given["energy"], given["max_error"], given["max_size"]),
        given["dtype"] or "auto",
        given["compact"],
    )
    return WrittenPlan(
        adapters,
        weights,
        (given["alpha"],) * len(adapters),
        formula,
        given["force"],
        with_base=given["with_base"],
        dora_rank=given["dora_rank"],
    )


def _weight(text: str) -> Weight:
    """`0.7`, or `0.7/0.5/0.3`: one for each group of layers, from the first to the last."""
    from adapterhub_local.refs import parse_weight

    parts = tuple(parse_weight(part) for part in text.split("/"))
    return parts if len(parts) > 1 else parts[0]


def _scored_on(written: WrittenPlan, given: dict[str, Any], adapters: tuple[str, ...], dry_run: bool) -> WrittenPlan:
    """With what --require, --data and --limit add to what the plan scores."""
    from adapterhub_local.evaluate.gate import Requirement

    if dry_run and (given["require"] or given["data"]):
        raise InputError("--require and --data score what is made: leave --dry-run out")
    files = dict(map(_task_and_file, given["data"]))
    held = written.evaluate or Scored({})
    requirements = [Requirement.parse(text) for text in given["require"]]
    held = replace(
        held,
        data={**held.data, **files},
        limit=given["limit"] or held.limit,
        require=(*given["require"], *held.require),
    )
    for requirement in requirements:
        if requirement.task not in held.data:
            raise InputError(f"{requirement} cannot be checked without data: give --data {requirement.task}=FILE.jsonl")
    return replace(written, evaluate=held if held.data or held.require else None)


def _put_where(written: WrittenPlan, given: dict[str, Any], dry_run: bool) -> WrittenPlan:
    """With where the command line says the result goes, or else the plan, or else a file beside."""
    from adapterhub_local.merge.destination import Destination

    asked = Destination(given["name"], given["alias"], given["output"])
    if dry_run:
        if asked.is_given:
            raise InputError("--dry-run writes nothing: leave --name and -o out")
        return written
    there = asked if asked.is_given else Destination(written.name, written.alias, written.path)
    there = there.beside(written.labels)
    return replace(written, name=there.name, alias=there.alias, path=there.path)


def _task_and_file(text: str) -> tuple[str, Path]:
    task, equals, file = text.partition("=")
    if not task or not equals or not file:
        raise InputError(f"--data is {text[:80]!r}: write a task and its file, such as sentiment=sentiment.test.jsonl")
    return task, Path(file)
