"""`qhub recipe`: init, import, check, show, schema."""

from pathlib import Path
from typing import Any

import click

from adapterhub_local.cli.output import echo, print_json, print_table
from adapterhub_local.settings import device, home

RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
SET = click.option(
    "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Change a key, such as train.seed=1."
)


@click.group(name="recipe")
def command() -> None:
    """Write, check and explain recipes: the TOML files that `qhub train` takes."""


@command.command()
@click.argument("file", type=click.Path(path_type=Path), default=Path("recipe.toml"))
@click.option("--base", help="The base to train against; the only one there is if not given.")
@click.option("--data", default="train.jsonl", show_default=True, help="The file of examples, as seen from FILE.")
@click.option("--name", help="The adapter's name; that of FILE if not given.")
def init(file: Path, base: str | None, data: str, name: str | None) -> None:
    """Write a commented recipe to begin with to FILE (recipe.toml)."""
    from adapterhub_local.base.bases import find_base, list_bases
    from adapterhub_local.errors import InputError, InUse
    from adapterhub_local.recipe.write import starter
    from adapterhub_local.refs import check_name

    if file.exists():
        raise InUse(f"{file} exists already: name another file")
    if not file.absolute().parent.is_dir():
        raise InputError(f"{file.absolute().parent} does not exist: create the folder first")
    bases = [item.name for item in list_bases(home())]
    chosen = find_base(base, home()).name if base else bases[0] if len(bases) == 1 else "BASE"
    named = check_name(name or (file.stem if file.stem != "recipe" else "my-adapter"))
    given = {"base.name": chosen, "data.train": data, "output.name": named}
    with open(file, "x", encoding="utf-8") as stream:
        stream.write(starter(given, str(file)))
    hint = "" if chosen != "BASE" else f"; write one of these as base.name: {', '.join(bases) or 'none added yet'}"
    echo(f"{file} is written{hint}. Next: qhub recipe check {file}")


@command.command(name="import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "file",
    type=click.Path(path_type=Path),
    default=Path("recipe.toml"),
    show_default=True,
    help="The recipe to write.",
)
@click.option("--base", help="The base to train against; the one that was made of the model it names if not given.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: what was taken over, and what was not.")
def import_(source: Path, file: Path, base: str | None, as_json: bool) -> None:
    """Write a recipe to FILE from the settings of another tool in SOURCE.

    SOURCE is a config of axolotl, LLaMA-Factory, TRL or PEFT (YAML or JSON), or an Unsloth notebook or script, of which
    nothing is run. Every setting that has no place in a recipe is named with its reason.
    """
    from adapterhub_local.base.bases import find_base, list_bases
    from adapterhub_local.base.origin import same_model
    from adapterhub_local.errors import InputError, InUse
    from adapterhub_local.recipe.convert import convert_settings
    from adapterhub_local.recipe.foreign import read_settings
    from adapterhub_local.recipe.write import starter

    if file.exists():
        raise InUse(f"{file} exists already: name another file with -o")
    if not file.absolute().parent.is_dir():
        raise InputError(f"{file.absolute().parent} does not exist: create the folder first")
    bases = list_bases(home())

    def known(model: str) -> str | None:
        ours = (item for item in bases if item.hub_id and model.count("/") == 1 and same_model(model, item.hub_id))
        return next((item.name for item in ours), None)

    found = convert_settings(read_settings(source), known)
    if base:
        found.given["base.name"] = find_base(base, home()).name
    elif found.base and known(found.base) is None:
        found.notes.append(f"add its model: qhub base add {found.given['base.name']} {found.base}")
    lost = "".join(f"# not taken over: {key}: {reason}\n" for key, reason in found.dropped.items())
    with open(file, "x", encoding="utf-8") as stream:
        stream.write(f"# From {source.name}.\n{lost}\n{starter(found.given, str(file))}")
    if as_json:
        print_json({"recipe": str(file), "given": found.given, "dropped": found.dropped, "notes": found.notes})
        return
    echo(f"{file} is written: {len(found.given)} settings taken over, {len(found.dropped)} not")
    for key, reason in found.dropped.items():
        echo(f"  {key}: {reason}")
    for note in found.notes:
        echo(note)
    echo(f"Next: qhub recipe check {file}")


@command.command()
@RECIPE
@SET
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check RECIPE, its base and all of its data without training; nothing is written.

    Every mistake is reported with its place. Exit code 0: `qhub train` can start.
    """
    from adapterhub_local.recipe import load_recipe, load_runs
    from adapterhub_local.train.check import check_comparable, check_runs, read_all

    loaded = load_recipe(recipe, overrides)
    runs = load_runs(loaded)
    check_runs(runs, home())
    datasets = read_all(runs)
    if loaded.sweep:
        check_comparable(loaded, datasets.values())
    from adapterhub_local.train.statistics import describe_runs

    described = describe_runs(runs, datasets, home())  # tokenised as the run will
    if device() == "cuda":
        from adapterhub_local.base.load import choose_device

        choose_device()
    dataset = next(iter(datasets.values()))
    if as_json:
        print_json({"recipe": loaded.to_json(), "runs": len(runs), "notes": dataset.notes, "data": described})
        return
    for note in dataset.notes:
        echo(note)
    print_statistics(described)
    swept = f", a sweep of {len(runs)} runs" if loaded.sweep else ""
    echo(f"{recipe} is valid{swept}. Next: qhub train {recipe}")


@command.command()
@RECIPE
@SET
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show RECIPE with every key resolved, and the file and line each value comes from."""
    from adapterhub_local.recipe import load_recipe
    from adapterhub_local.recipe.write import resolved, resolved_text

    loaded = load_recipe(recipe, overrides)
    runs = [list(run) for run in loaded.sweep.runs] if loaded.sweep else []
    if as_json:
        print_json({**resolved(loaded), **({"sweep": runs} if runs else {})})
        return
    echo(resolved_text(loaded).rstrip())
    for number, run in enumerate(runs, 1):
        echo(f"# run {number}: {' '.join(run)}")


@command.command()
def schema() -> None:
    """Print the JSON Schema of recipes, with which editors complete keys.

    \b
    qhub recipe schema > recipe.schema.json
    # and as the first line of a recipe, for Taplo and Even Better TOML:
    #:schema ./recipe.schema.json
    """
    from adapterhub_local.recipe.schema_json import json_schema

    print_json(json_schema())


def print_statistics(described: dict[str, Any]) -> None:
    """A table of what was tokenised, and what became of longer examples."""
    columns = ("data", "examples", "tokens", "learned", "shortest", "median", "95 %", "longest")
    rows = [
        (role, *(f"{part[key]:,}" for key in ("examples", "tokens", "labels", "min", "median", "p95", "max")))
        for role, part in described.items()
    ]
    print_table(columns, rows)
    for role, part in described.items():
        for note in part["notes"]:
            echo(f"{role}: {note}")
