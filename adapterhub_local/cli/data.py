"""`qhub data`: preview."""

import sys
from pathlib import Path
from typing import Any

import click

from adapterhub_local.cli.output import echo, print_json
from adapterhub_local.cli.recipe import RECIPE, SET, print_statistics
from adapterhub_local.counts import counted
from adapterhub_local.settings import home, wants_colour
from adapterhub_local.visible import visible


@click.group(name="data")
def command() -> None:
    """Look at training data as the model will see it."""


@command.command()
@RECIPE
@SET
@click.option(
    "-n", "--samples", type=click.IntRange(0), default=3, show_default=True, help="How many examples to show."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: statistics, and each token with whether it is learned."
)
def preview(recipe: Path, overrides: tuple[str, ...], samples: int, as_json: bool) -> None:
    """Show examples of RECIPE in the base's chat template: what is learned, what is not, and how long they are.

    On a terminal what is learned is green; elsewhere, and with NO_COLOR, it stands between >> and <<.
    """
    from adapterhub_local.base.bases import find_base
    from adapterhub_local.data.dataset import read_data
    from adapterhub_local.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    info = find_base(loaded.base.name, home())
    dataset = read_data(loaded)
    from adapterhub_local.train.statistics import statistics, tokenised
    from adapterhub_local.train.tokens import load_tokenizer

    tokenizer = load_tokenizer(info)
    train, test = tokenised(loaded, dataset, info, tokenizer)
    described = {
        role: {**statistics(part), "notes": part.notes()}
        for role, part in (("train", train), ("test", test))
        if part is not None
    }
    shown = [(number, part) for number, item in enumerate(train.items[:samples], 1) for part in item.parts]
    if as_json:
        tokens = [_tokens(tokenizer, example) for _, example in shown]
        print_json({"notes": dataset.notes, "data": described, "samples": tokens})
        return
    for note in dataset.notes:
        echo(note)
    for number, example in shown:
        echo(f"\n-- example {number}: {counted(len(example.ids), 'token')}, {example.num_labels} learned --")
        echo(_masked(tokenizer, example, is_coloured=sys.stdout.isatty() and wants_colour()), is_styled=True)
    echo()
    print_statistics(described)


def _masked(tokenizer: Any, example: Any, *, is_coloured: bool) -> str:
    """The text of an example, what is learned marked."""
    text, at = "", 0
    for start, end in (*example.spans, (len(example.ids), len(example.ids))):
        text += visible(_decoded(tokenizer, example.ids[at:start]))
        learned = visible(_decoded(tokenizer, example.ids[start:end]))
        text += click.style(learned, fg="green") if is_coloured else f">>{learned}<<" if learned else ""
        at = end
    return text


def _decoded(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _tokens(tokenizer: Any, example: Any) -> dict[str, Any]:
    """Every token of an example with its text, and whether it is learned."""
    learned = {position for start, end in example.spans for position in range(start, end)}
    names = tokenizer.convert_ids_to_tokens(list(example.ids))
    tokens = [
        {"id": token, "token": name, "learned": at in learned}
        for at, (token, name) in enumerate(zip(example.ids, names, strict=True))
    ]
    return {"text": _decoded(tokenizer, example.ids), "tokens": tokens}
