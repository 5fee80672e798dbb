"""Configuration: options of `qhub serve` in a TOML file, read at the start and again at SIGHUP.

timeout = 60                    a key is the name of an option; what the command line gives goes before it
allow-host = ["gpu.example"]    an option that may be repeated may be a list
"""

import difflib
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.options import options_of
from serve.options import HttpOptions

NOT_IN_A_FILE = ("config", "help")


def read_file(path: Path, command: click.Command) -> dict[str, Any]:
    """The options that a file gives, as click takes them for defaults. Raises InputError with the file and the key."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a file that can be read again: write the options into one")
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    known = {
        flag.removeprefix("--"): option
        for option in command.params
        if isinstance(option, click.Option) and option.name not in NOT_IN_A_FILE
        for flag in option.opts
        if flag.startswith("--")
    }
    found: dict[str, Any] = {}
    for name, value in table.items():
        option = known.get(name.replace("_", "-"))
        if option is None:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]}?" if near else ", see `qhub serve --help`"
            raise InputError(f"{path}: '{name}' is not an option{hint}")
        assert option.name
        if option.name in found:
            raise InputError(f"{path}: '{name}' is given twice")
        found[option.name] = _value(value, option, path, name)
    return found


def _value(value: Any, option: click.Option, path: Path, name: str) -> Any:
    """A value as it would stand on the command line; paths count from the file's folder."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise InputError(f"{path}: '{name}' is {value!r}: it must be true or false")
        return value
    texts = value if option.multiple and isinstance(value, list) else [value]
    if any(isinstance(text, dict | list | bool) for text in texts):
        raise InputError(f"{path}: '{name}' is {value!r}: write it as on the command line")
    if any("\0" in str(text) for text in texts):
        raise InputError(f"{path}: '{name}' has a character NUL, which no option may have")
    if isinstance(option.type, click.Path):
        if "" in texts:
            raise InputError(f"{path}: '{name}' is empty: it must be a path")
        texts = [path.parent / str(text) for text in texts]
    elif option.name == "remote" and str(texts[0]).startswith("."):
        texts = [path.parent / texts[0]]
    return [str(text) for text in texts] if option.multiple else str(texts[0])


class Configuration:
    """What a server was started with: the command line and the file of `context`, which is that of a `Command`."""

    def __init__(self, context: click.Context) -> None:
        self._context = context
        self._given = dict(context.params)
        self._flags = {option.name: option.opts[0].removeprefix("--") for option in context.command.params}

    def reread(self, http: HttpOptions) -> tuple[HttpOptions, list[str], list[str]]:
        """The options that hold from now on, what changed, and what would change if the server were started again.

        Raises InputError about what cannot be read; then nothing changes.
        """
        context = self._context
        try:
            wanted = context.command.make_context(context.info_name, list(context.meta[GIVEN]), context.parent).params
        except click.ClickException as error:
            raise InputError(error.format_message()) from None
        live = {name for name, (_, known) in options_of(HttpOptions).items() if known.live}
        changed = {name: wanted[name] for name in live if wanted[name] != self._given[name]}
        later = [self._flags[name] for name in self._given if name not in live and wanted[name] != self._given[name]]
        try:
            http = replace(http, **changed)
        except QhubError as error:
            raise InputError(str(error)) from None
        notes = [f"{self._flags[name]} is {wanted[name]}, was {self._given[name]}" for name in changed]
        self._given |= changed
        return http, sorted(notes), sorted(later)


GIVEN = "serve.configuration.given"


class Command(click.Command):
    """A command that can be parsed again: its context keeps the arguments in `meta`."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        given = list(args)
        try:
            context = super().make_context(info_name, args, parent, **extra)
        except click.BadParameter as error:
            raise _with_place(error) from None
        context.meta[GIVEN] = given
        return context


def _with_place(error: click.BadParameter) -> click.UsageError:
    """The error, with the file if the value that is wrong stands there."""
    context, option = error.ctx, error.param
    if context is None or option is None or option.name not in (context.default_map or {}):
        return error
    flag = option.opts[0].removeprefix("--")
    return click.UsageError(f"{context.params['config']}: '{flag}': {error.message}", context)


def from_file(context: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """The callback of --config."""
    if path is not None:
        context.default_map = read_file(path, context.command)
    return path
