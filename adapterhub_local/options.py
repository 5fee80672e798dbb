"""Options exist once: a field of a dataclass holds name, default, limits and help; the command line is built from it.

A field made by `option` is checked by `check_options`, is shown by `--help` through `add_options`, and gets its value
from what the command was given through `chosen`. Fields without it have no option.
"""

import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import click

from adapterhub_local.errors import InputError
from adapterhub_local.sizes import parse_size, write_size


@dataclass(frozen=True)
class Option:
    """How one field is written on the command line.

    flags      such as --max-rows; none: made of the field's name
    help       what it does, a sentence with its full stop
    low        the least value; `above` instead: what the value must be more than
    choices    the words that it may be
    unit       for sizes, what a number without a unit counts in: B or MB; other units may be written behind it
    on_gpu     the default on a GPU, where it is another
    live       whether the value may change while the server runs
    derived    what stands for a default of None, as a half-sentence
    """

    help: str
    flags: tuple[str, ...] = ()
    low: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    unit: str | None = None
    on_gpu: Any = None
    live: bool = False
    derived: str | None = None
    metavar: str | None = None


def option(default: Any, help: str, *flags: str, **details: Any) -> Any:  # noqa: A002
    """A dataclass field with an option; `details` are those of `Option`."""
    return field(default=default, metadata={"option": Option(help, flags, **details)})


def options_of(table: Any) -> dict[str, tuple[Field[Any], Option]]:
    """The fields of a dataclass, or of its class, that have an option."""
    return {item.name: (item, item.metadata["option"]) for item in fields(table) if "option" in item.metadata}


def check_options(table: Any) -> None:
    """Raises InputError for a value of a field that is outside of what its option allows."""
    for name, (_, known) in options_of(table).items():
        value = getattr(table, name)
        if value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name} is {value}: it must be a number of finite size")
        if known.low is not None and not value >= known.low:
            raise InputError(f"{name} is {value}: it must be at least {known.low:g}")
        if known.above is not None and not value > known.above:
            raise InputError(f"{name} is {value}: it must be more than {known.above:g}")
        if known.choices and value not in known.choices:
            raise InputError(f"{name} is {value!r}: it must be {', '.join(known.choices)}")


def on_gpu(table: type) -> dict[str, Any]:
    """The defaults of a dataclass's fields that are others on a GPU."""
    return {name: known.on_gpu for name, (_, known) in options_of(table).items() if known.on_gpu is not None}


def add_options(table: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a click command an option for each field of a dataclass that has one, in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(table)
        for name, (item, known) in reversed(options_of(table).items()):
            function = _click_option(name, item.default, known, hints[name])(function)
        return function

    return decorate


def chosen(table: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a command's parameters those that are fields of `table`; None, which stands for not given, is left out."""
    return {name: given[name] for name in options_of(table) if given.get(name) is not None}


class Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """A size in bytes, written as 512MiB or 2GB; a number alone counts in `unit`."""

    name = "size"

    def __init__(self, unit: str, low: float | None) -> None:
        self.unit, self.low = unit, low or 0

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            size = parse_size(value, self.unit)
        except InputError as error:
            self.fail(str(error), param, ctx)
        if size < self.low:
            self.fail(f"'{value}' is less than {write_size(int(self.low))}", param, ctx)
        return size


def _click_option(name: str, default: Any, known: Option, hint: Any) -> Callable[[Callable[..., Any]], Any]:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    flags = known.flags or (f"--{name.replace('_', '-')}",)
    help_text, shown = known.help, default
    if known.on_gpu is not None:
        on_cpu, there = (_text(value, known) for value in (default, known.on_gpu))
        help_text, shown = f"{help_text} Default: {on_cpu} on the CPU, {there} on a GPU.", None
    elif default is None and known.derived:
        help_text = f"{help_text} Default: {known.derived}."
    elif known.unit:
        shown = write_size(default)
    if known.unit:
        extra = f" A number alone is in {known.unit}." if known.unit != "B" else ""
        return click.option(
            *flags, name, default=shown, type=Size(known.unit, known.low), metavar="SIZE", help=help_text + extra
        )
    if kind is bool:
        flag = flags[0].removeprefix("--")
        return click.option(f"--{flag}/--no-{flag}", name, default=shown, help=help_text)
    if typing.get_origin(kind) is tuple:
        return click.option(*flags, name, multiple=True, metavar=known.metavar, help=f"{help_text} Repeatable.")
    return click.option(*flags, name, default=shown, type=_type(kind, known), metavar=known.metavar, help=help_text)


def _type(kind: Any, known: Option) -> Any:
    if known.choices:
        return click.Choice(known.choices)
    if kind is Path:
        return click.Path(path_type=Path)
    if kind is int:
        return click.IntRange(None if known.low is None else int(known.low))
    if kind is float:
        low = known.low if known.above is None else known.above
        return click.FloatRange(low, min_open=known.above is not None)
    return kind


def _text(value: Any, known: Option) -> str:
    return write_size(value) if known.unit else str(value)
