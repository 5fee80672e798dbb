"""The pages of the site that are made from the code: every verb, server option, recipe key and merge method."""

from collections.abc import Iterator, Mapping
from typing import Any

import click

from adapterhub_local.cli.main import SECTIONS, Verbs, qhub
from adapterhub_local.recipe.reference import reference as recipe_keys


def pages() -> dict[str, str]:
    """Path of each generated page -> its Markdown."""
    return {
        "reference/verbs.md": verbs(),
        "reference/server-options.md": server_options(),
        "reference/recipe-keys.md": f"# Recipe keys\n\n{recipe_keys()}\n",
        "reference/merge-methods.md": merge_methods(),
    }


def verbs() -> str:
    """Each verb in the order of `qhub --help`, with its arguments and options."""
    assert isinstance(qhub, Verbs)
    context = click.Context(qhub, info_name="qhub")
    parts = ["# Commands", "Exit codes: 0 done, 1 failure, 2 wrong usage or input, 130 stopped by you."]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}")
        for name in names:
            command = qhub.get_command(context, name)
            assert command is not None, name
            parts += _command(command, click.Context(command, info_name=name, parent=context), 3)
    return "\n\n".join(parts) + "\n"


def server_options() -> str:
    """The options of `qhub serve`."""
    from serve.__main__ import command

    context = click.Context(command, info_name="serve", parent=click.Context(qhub, info_name="qhub"))
    return "# Server options\n\n" + "\n\n".join(_command(command, context, 2)) + "\n"


def merge_methods() -> str:
    """The table of methods: what each does, its parameters with bounds and defaults, where it works, its paper."""
    from adapterhub_local.merge.methods import METHODS

    lines = ["# Merge methods", "", "| method | what it does | parameters | spaces | paper |", "|---|---|---|---|---|"]
    for name, method in METHODS.items():
        function = method.linear or method.on_entries()
        does = next(iter((function.__doc__ or "").strip().splitlines()), "")
        parameters = "<br>".join(f"`{key}` = {row.default}{_bounds(row)}" for key, row in method.parameters.items())
        paper = f"[paper]({method.paper})" if method.paper.startswith("http") else method.paper
        lines.append(f"| `{name}` | {_cell(does)} | {parameters} | {', '.join(method.spaces) or 'exact'} | {paper} |")
    return "\n".join(lines) + "\n"


def _bounds(row: Any) -> str:
    if row.choices:
        return f" ({', '.join(row.choices)})"
    return f" ({'from' if row.low_included else 'above'} {row.low:g}" + (
        f" to {row.high:g})" if row.high < 1e9 else ")"
    )


def _command(command: click.Command, context: click.Context, depth: int) -> Iterator[str]:
    """A command as Markdown: its usage, help and options, and those of its subcommands."""
    yield f"{'#' * depth} {context.command_path}"
    yield "```text\n" + command.get_usage(context).removeprefix("Usage: ") + "\n```"
    if command.help:
        yield command.help.replace("\b\n", "").strip()
    rows = [row for parameter in command.get_params(context) if (row := _row(parameter.to_info_dict()))]
    if rows:
        yield "| option | value | default | meaning |\n| --- | --- | --- | --- |\n" + "\n".join(rows)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _command(child, click.Context(child, info_name=name, parent=context), depth + 1)


def _row(option: Mapping[str, Any]) -> str | None:
    """One option as a row of a table; None for arguments and --help, which the usage line shows."""
    if option["param_type_name"] != "option" or option.get("hidden") or "--help" in option["opts"]:
        return None
    names = " ".join(f"`{name}`" for name in [*option["opts"], *option["secondary_opts"]])
    kind = "" if option["is_flag"] else ", ".join(option["type"].get("choices", [])) or option["type"]["name"]
    default = option["default"]
    shown = "" if default in (None, False, ()) or option["is_flag"] or callable(default) else f"`{_cell(str(default))}`"
    shown = "" if "UNSET" in shown else shown
    return f"| {names} | {_cell(kind)} | {shown} | {_cell(option.get('help') or '')} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
