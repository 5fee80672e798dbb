"""`qhub try-merges`: what several merges of the same adapters answer to held-out examples, side by side."""

from pathlib import Path
from typing import Any

import click

from adapterhub_local.cli.output import echo, print_json, print_table, reporter, score_text
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry


@click.command(name="try-merges")
@click.argument("adapters", nargs=-1, required=True)
@click.option("--weights", metavar="W1,W2,...", required=True, help="One weight for each adapter; may be negative.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    required=True,
    metavar="'METHOD NAME=VALUE ...'",
    help="A method with its settings, such as 'ties density=0.2 rank=16'; up to four.",
)
@click.option(
    "--recipe", type=click.Path(path_type=Path), required=True, help="Its held-out data are asked, read as it says."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the recipe, as `qhub train` does.")
@click.option("--limit", type=click.IntRange(1, 20), default=10, show_default=True, help="How many examples are asked.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with 95 % intervals and every answer.")
def command(
    adapters: tuple[str, ...], weights: str, methods: tuple[str, ...], recipe: Path, overrides: tuple[str, ...],
    limit: int, as_json: bool,
) -> None:  # fmt: skip
    """Compare what several merges of ADAPTERS answer to the first held-out examples of a recipe. No merge is kept.

    \b
    qhub try-merges sentiment@1 origin@1 --weights 0.6,0.4 --method weighted_sum --method 'ties density=0.2' \\
        --recipe recipes/sentiment.toml
    """
    from adapterhub_local.evaluate.side_by_side import side_by_side
    from adapterhub_local.merge.plan_file import WrittenPlan
    from adapterhub_local.merge.spelled import parse_formula
    from adapterhub_local.recipe.reader import load_recipe
    from adapterhub_local.refs import parse_weight

    formulas = {" ".join(text.split()): parse_formula(text) for text in methods}
    if len(formulas) < len(methods):
        raise InputError("two of the methods are the same: give each once")
    given = tuple(parse_weight(weight) for weight in weights.split(","))
    for formula in formulas.values():
        formula.check(given)
    written = WrittenPlan(adapters, given, (None,) * len(adapters), next(iter(formulas.values())))
    found = side_by_side(
        written, formulas, load_recipe(recipe, overrides), Registry(), limit=limit, reporter=reporter()
    )
    if as_json:
        print_json(found)
        return
    columns = found["columns"]
    print_table(("", found["task"], "loss", "rank", "error"), [_row(column) for column in columns])
    for number, example in enumerate(found["examples"], 1):
        echo(f"\n{number}. {example['prompt']}\n   wanted: {example['wanted']}")
        for column, answer in zip(columns, example["answers"], strict=True):
            echo(f"   {'=' if answer['is_exact'] else ' '} {column['name']}: {answer['text']}")


def _row(column: dict[str, Any]) -> tuple[str, ...]:
    scores = column["scores"]
    exact = score_text("exact_match", scores["exact_match"], scores["intervals"]["exact_match"])
    error = f"{column['relative_error']:.2e}" if "relative_error" in column else ""
    return column["name"], exact, f"{scores['loss']:.4f}", str(column.get("rank", "")), error
