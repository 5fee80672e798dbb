"""How verbs print: tables for people, JSON for programs, progress only on a terminal."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from adapterhub_local.progress import Lines, Reporter, Terminal
from adapterhub_local.visible import visible, visible_json, visible_line

if TYPE_CHECKING:
    from adapterhub_local.registry import Version


def echo(text: object = "", *, err: bool = False, nl: bool = True, is_styled: bool = False) -> None:
    """Print a line, or several, without what a terminal would obey: every verb prints with it, or a table or JSON.

    Text that `is_styled` has colours of our own and was made visible before.
    """
    click.echo(text if is_styled else visible(str(text)), err=err, nl=nl)


def print_json(value: Any) -> None:
    """`value` as indented JSON on standard output."""
    click.echo(visible_json(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """A table on standard output; nothing is cut off when it is not a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD, title=None if title is None else visible_line(title), title_justify="left", pad_edge=False
    )
    for number, column in enumerate(columns):  # the first says what a row is about: the others are folded before it
        table.add_column(visible_line(str(column)), overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*("" if cell is None else visible_line(str(cell)) for cell in row))
    # a description may hold [brackets] and :colons:, which rich would take for markup
    console = Console(highlight=False, markup=False, emoji=False)
    if not sys.stdout.isatty():  # a program reads it: as wide as the longest cell, so that no path is broken in two
        console.width = console.measure(table, options=console.options.update(width=1_000_000)).maximum
    console.print(table)


def score_text(metric: str, value: float, interval: Sequence[float] | None = None, *, is_signed: bool = False) -> str:
    """A score for people, with its interval: `89.5% [84.5, 93.0]`; what is not a share as a number."""
    from adapterhub_local.registry.catalog import SHARES

    is_share = metric in SHARES
    sign = "+" if is_signed else ""
    text = f"{100 * value:{sign}.1f}%" if is_share else f"{value:{sign}.4f}"
    if interval is None:
        return text
    low, high = (f"{100 * bound:{sign}.1f}" if is_share else f"{bound:{sign}.4f}" for bound in interval)
    return f"{text} [{low}, {high}]"


@contextmanager
def counting(what: str, *, in_bytes: bool = False) -> Iterator[Any]:
    """A `progress(done, total)` function that draws a bar with rate and time left, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        count,
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(visible_line(what), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def reporter() -> Reporter:
    """What shows progress: bars on a terminal, else nothing."""
    return Terminal() if sys.stderr.isatty() else Lines()


def size_text(size: int) -> str:
    """Bytes for people: 111.9 MB."""
    number, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def note_taken_in(version: "Version") -> None:
    """Notes of an adapter from elsewhere: that it has no effect, and tensors left out since its base has them."""
    from adapterhub_local.lora.adapter import open_adapter

    if open_adapter(version.path, dora=True, tokens=True).changes_nothing():
        echo(
            f"note: {version} changes nothing: its scale or a factor of each module is zero. Was it trained?", err=True
        )
    if left_out := version.lineage.get("left_out"):
        shown = ", ".join(left_out[:4]) + (f" and {len(left_out) - 4} more" if len(left_out) > 4 else "")
        echo(f"note: left out, as equal to the base's own: {shown}", err=True)
