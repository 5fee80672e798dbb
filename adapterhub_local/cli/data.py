"""`qhub data`: preview, from-log."""

import sys
from datetime import UTC, datetime, timedelta
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
    """Look at training data as the model will see it, and make some of what a server answered."""


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


@command.command(name="from-log")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The file of rows to write (.jsonl).")
@click.option(
    "--as",
    "form",
    type=click.Choice(["messages", "preference", "judged"]),
    default="messages",
    show_default=True,
    help="What a row is, as data.format names it: an answer to learn (train.objective = 'sft'), one answer over "
    "another (dpo, ipo, simpo, orpo), or an answer judged good or bad (kto).",
)
@click.option("--adapter", "adapters", multiple=True, metavar="NAME[@N]",
              help="Only answers of this adapter, of all its versions or of one, or of the base by its name. "
              "Repeatable.")  # fmt: skip
@click.option(
    "--since", metavar="TIME", help="Only answers from then on: 2026-11-01, 2026-11-01T12:00 (UTC), 12h or 30d ago."
)
@click.option("--min-rating", type=click.FloatRange(0, 1), metavar="RATING",
              help="An answer is good from this rating on, from 0 to 1; what is not rated is left out, too. Without it "
              "what is rated above 0.5 is good.")  # fmt: skip
@click.option("--rated-only", is_flag=True, help="Only answers that were rated or corrected.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: what was taken and left out, and whose answers.")
def from_log(
    folder: Path,
    out: Path,
    form: str,
    adapters: tuple[str, ...],
    since: str | None,
    min_rating: float | None,
    rated_only: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write training rows from the request log in FOLDER, which `qhub serve --request-log` keeps.

    Messages: an answer with what it answers, the correction in its place if it has one; what was rated bad is left
    out. Only the answer itself is learned, not those before it in the conversation. Preference: a correction over the
    answer, and the better over the worse of answers to one prompt. Judged: each rated answer; one that was corrected is
    bad, its correction good.

    The last feedback on an answer counts. Equal rows are written once, answers that were cut off are left out, and each
    row is read back as training reads it. What people wrote to the server is in the file: only you can read it.
    """
    from adapterhub_local.data.from_log import OBJECTIVE, Wanted, check_out, rows_of_log, write_rows
    from adapterhub_local.data.logged import Asked
    from adapterhub_local.errors import BadReference
    from adapterhub_local.refs import Reference

    references = tuple(Reference.parse(text) for text in adapters)
    if moving := next((each for each in references if each.alias is not None), None):
        raise BadReference(f"'{moving}' is an alias, which may have moved since: write the version, {moving.name}@3")
    check_out(out, overwrite=overwrite)
    rows = rows_of_log(folder, Asked(references, _time(since)), Wanted(form, min_rating, rated_only))
    report = write_rows(rows, folder, out)
    if as_json:
        print_json({"out": str(out), "format": form, **report})
        return
    taken = ", ".join(f"{kind}: {count:,}" for kind, count in report["taken"].items())
    echo(f"{out} is written: {counted(report['rows'], 'row')} ({taken}), from {rows.log.summary}")
    for source in report["answers_of"]:
        echo(f"  {source['adapter'] or source['base']}: {counted(source['rows'], 'row')}")
    for reason, count in report["left_out"].items():
        echo(f"left out ({count:,}): {reason}")
    for problem in report["unreadable"]:
        echo(f"not read: {problem}")
    echo(f"Next: a recipe with data.train = '{out}' and train.objective = '{OBJECTIVE[form]}', and qhub recipe check")


def _time(text: str | None) -> datetime | None:
    """A moment as people write it: a day, a time, or so many hours or days ago. Raises UsageError."""
    if text is None:
        return None
    if text[:-1].isascii() and text[:-1].isdigit() and len(text) < 7 and text[-1] in "hd":
        return datetime.now(UTC) - timedelta(hours=int(text[:-1]) * (24 if text[-1] == "d" else 1))
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise click.UsageError(
            f"--since {text[:40]!r} is not a time: write 2026-11-01, 2026-11-01T12:00, 12h or 30d"
        ) from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


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
