"""Sizes are read and written in one place, and every option's help, default and limits are its field's."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.errors import InputError
from adapterhub_local.options import Option, add_options, chosen, option, options_of
from adapterhub_local.sizes import UNITS, parse_size, write_size
from serve.__main__ import command
from serve.engine.options import EngineOptions
from serve.options import HttpOptions

TABLES = (HttpOptions, EngineOptions)
OPTIONS = [
    pytest.param(item, known, id=f"{table.__name__}.{name}")
    for table in TABLES
    for name, (item, known) in options_of(table).items()
]


@pytest.mark.parametrize(
    ("text", "unit", "size"),
    [
        ("2GB", "B", 2_000_000_000),
        ("512MiB", "B", 512 << 20),
        ("512", "MB", 512_000_000),
        ("512", "B", 512),
        (" 1.5 gb ", "MB", 1_500_000_000),
        ("0", "MB", 0),
        ("0.5KiB", "MB", 512),
        ("1.0000001kB", "B", 1000),
        ("3tib", "B", 3 << 40),
    ],
)
def test_a_size_has_one_meaning(text: str, unit: str, size: int) -> None:
    """Units of 1000 and of 1024 differ, case does not matter, and a bare number counts in the option's unit."""
    assert parse_size(text, unit) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "1e9", "2 G", "2GBs", "1,5GB", "٣GB", "0x10", "9" * 40, "1..5", "inf"]
)
def test_what_is_not_a_size_is_refused_with_the_way_out(text: str) -> None:
    """Anything else, G for GB or GiB included, is an error that shows how a size is written."""
    with pytest.raises(InputError, match="is not a size: write a number and one of B, kB"):
        parse_size(text)


@given(st.integers(0, 10**18 - 1))
def test_a_written_size_is_read_back(size: int) -> None:
    """`parse_size` of `write_size` is the same number of bytes."""
    assert parse_size(write_size(size), "MB") == size


@given(st.integers(0, 10**6), st.sampled_from(sorted(UNITS)))
def test_every_unit_is_read_back(number: int, unit: str) -> None:
    """A whole number of any unit survives being written and read."""
    assert parse_size(write_size(number * UNITS[unit]), "MB") == number * UNITS[unit] == parse_size(f"{number}{unit}")


def _help(name: str) -> str:
    """The help of one parameter of `qhub serve`, with the default as it is shown, on one line."""
    (parameter,) = (parameter for parameter in command.params if parameter.name == name)
    assert isinstance(parameter, click.Option)
    record = parameter.get_help_record(click.Context(command, show_default=True))
    assert record is not None
    return " ".join(record[1].split())


@pytest.mark.parametrize(("item", "known"), OPTIONS)
def test_help_shows_the_default_of_the_field(item: dataclasses.Field[Any], known: Option) -> None:
    """The default that `qhub serve --help` shows is the one that the dataclass has, on a GPU too."""
    text = _help(item.name)
    written = re.search(r"\[default: ([^;\]]+)", text)
    both = re.search(r"Default: (\S+) on the CPU, (\S+) on a GPU\.", text)

    def value(shown: str) -> Any:
        if known.unit:
            return parse_size(shown, known.unit)
        if isinstance(item.default, bool):  # click shows which of the two spellings is the default
            return not shown.startswith("no-")
        return type(item.default)(shown.strip('"'))

    if both:
        assert (value(both[1]), value(both[2])) == (item.default, known.on_gpu)
    elif written:
        assert value(written[1]) == item.default
    else:
        assert item.default in (None, ())
        assert item.default == () or f"Default: {known.derived}." in text


def test_every_option_is_one_of_the_command_and_nothing_given_is_the_dataclass_default() -> None:
    """A command line without options makes exactly `EngineOptions.on(device)` and `HttpOptions()`."""
    seen: dict[str, Any] = {}

    @click.command()
    @add_options(HttpOptions)
    @add_options(EngineOptions)
    def probe(**limits: Any) -> None:
        seen.update(limits)

    assert CliRunner().invoke(probe, [], catch_exceptions=False).exit_code == 0
    assert {name for table in TABLES for name in options_of(table)} == set(seen)
    assert HttpOptions(**chosen(HttpOptions, seen)) == HttpOptions()
    for device in ("cpu", "cuda"):
        assert EngineOptions.on(device, **chosen(EngineOptions, seen)) == EngineOptions.on(device)


@pytest.mark.parametrize("flag", ["--kv-cache", "--kv-cache-mb"])
def test_old_commands_mean_what_they_meant(flag: str) -> None:
    """A bare number of a memory option is megabytes under both its names, and a unit may be written behind it."""
    seen: dict[str, Any] = {}

    @click.command()
    @add_options(EngineOptions)
    def probe(**limits: Any) -> None:
        seen.update(limits)

    for text, size in (("512", 512_000_000), ("512MiB", 512 << 20), ("2GB", 2_000_000_000)):
        assert CliRunner().invoke(probe, [flag, text], catch_exceptions=False).exit_code == 0
        assert seen["kv_bytes"] == size


@pytest.mark.parametrize("given_text", ["--kv-cache 0", "--kv-cache much", "--kv-cache 1.5.2GB", "--base-exec int8"])
def test_a_value_out_of_bounds_is_a_usage_error(given_text: str) -> None:
    """What an option cannot be is refused by the command line with exit code 2 and the option's name."""
    done = CliRunner().invoke(command, given_text.split())
    assert done.exit_code == 2
    assert given_text.split()[0] in done.output


@pytest.mark.parametrize(
    ("table", "values", "told"),
    [
        (EngineOptions, {"max_rows": 0}, "max_rows is 0: it must be at least 1"),
        (EngineOptions, {"prefix_bytes": -1}, "prefix_bytes is -1: it must be at least 0"),
        (EngineOptions, {"base_bytes": -1}, "base_bytes is -1: it must be at least 0"),
        (EngineOptions, {"kernels": "metal"}, "kernels is 'metal': it must be auto, triton, c, torch"),
        (HttpOptions, {"timeout": 0.0}, "timeout is 0.0: it must be more than 0"),
        (HttpOptions, {"timeout": float("nan")}, "timeout is nan: it must be a number of finite size"),
        (HttpOptions, {"drain": float("inf")}, "drain is inf: it must be a number of finite size"),
        (HttpOptions, {"max_body": 0}, "max_body is 0: it must be at least 1"),
        (HttpOptions, {"body_timeout": 0.0}, "body_timeout is 0.0: it must be more than 0"),
    ],
)
def test_the_library_checks_the_same_limits(table: type, values: dict[str, Any], told: str) -> None:
    """A dataclass made without the command line refuses what the command line refuses."""
    with pytest.raises(InputError, match=re.escape(told)):
        table(**values)


def test_a_new_field_is_a_new_option() -> None:
    """Each kind of field - number, text, choice, path, list, switch, size - is one option without another line."""

    @dataclasses.dataclass(frozen=True)
    class Table:
        share: float = option(0.5, "A share.", low=0)
        word: str = option("a", "A word.", choices=("a", "b"))
        folder: Path | None = option(None, "A folder.", derived="none")
        names: tuple[str, ...] = option((), "A name.", "--name")
        fast: bool = option(False, "Hurry.")
        room: int = option(10**6, "Room.", unit="MB")
        hidden: int = 3

    seen: list[Table] = []

    @click.command()
    @add_options(Table)
    def probe(**limits: Any) -> None:
        seen.append(Table(**chosen(Table, limits)))

    line = "--share 0.25 --word b --folder x --name n --name m --fast --room 1.5kB"
    assert CliRunner().invoke(probe, line.split(), catch_exceptions=False).exit_code == 0
    assert CliRunner().invoke(probe, [], catch_exceptions=False).exit_code == 0
    assert seen == [Table(0.25, "b", Path("x"), ("n", "m"), True, 1500), Table()]
