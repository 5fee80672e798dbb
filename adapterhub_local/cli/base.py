"""`qhub base`: add, list, show, path, rm."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import click

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.cli.output import counting, echo, print_json, print_table, size_text
from adapterhub_local.client import Server, check_here, chosen_server
from adapterhub_local.errors import NotFound
from adapterhub_local.settings import home


@click.group(name="base")
def command() -> None:
    """The shared 4-bit bases: quantised once, then loaded in a moment."""


@command.command()
@click.argument("name")
@click.argument("source")
@click.option("--hub-id", metavar="ORG/NAME", help="The Hub id of a local source, so that its adapters can be pushed.")
@click.option(
    "--chat-template",
    metavar="NAME|FILE.jinja",
    help="Give it this chat template: one of its own by name, chatml, llama3, gemma, zephyr, alpaca, or a file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the base as JSON.")
def add(name: str, source: str, hub_id: str | None, chat_template: str | None, as_json: bool) -> None:
    """Quantise SOURCE to NF4 with double quantisation and keep it as base NAME.

    SOURCE is a Hub id (ORG/NAME or ORG/NAME@REVISION), a transformers folder or a .gguf file. What bitsandbytes saved
    in NF4 or FP4 is taken as it is.
    """
    check_here("base add")
    from adapterhub_local.base.bases import check_base_name
    from adapterhub_local.errors import InUse
    from adapterhub_local.recipe.template_file import names_file, read_template

    if (home().bases / check_base_name(name)).exists():  # refused before anything heavy is loaded
        raise InUse(f"base '{name}' exists already: choose another name, or remove it with `qhub base rm {name}`")
    if chat_template is not None and names_file(chat_template):
        read_template(chat_template, Path())  # likewise, and before anything is fetched
    path, revision, is_private, licence = Path(os.path.expanduser(source)), None, False, None
    if not path.exists() and _is_hub_id(source):
        from adapterhub_local.hub.model import fetch_model

        hub_id, _, wanted = source.partition("@")
        fetched = fetch_model(hub_id, wanted or None)
        path, revision, is_private, licence = fetched.folder, fetched.commit, fetched.is_private, fetched.licence
    from adapterhub_local.base.add import add_base

    with counting(f"writing and reading back {name}") as progress:
        info = add_base(
            name, path, home(), hub_id=hub_id, revision=revision, source_name=None if revision is None else source,
            is_private=is_private, licence=licence, chat_template=chat_template, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(info.to_json())
    else:
        echo(f"{name}: {info.num_parameters / 1e6:.1f} M parameters in {size_text(info.size)}, {info.fingerprint[:19]}")
        if info.not_read_back:
            echo(f"not read back and compared with its source: {info.not_read_back}")
        if info.left_out:
            echo(f"its text part: {', '.join(info.left_out)} left out, so it takes text alone")


@command.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """List the bases."""
    from adapterhub_local.base.bases import list_bases

    server = chosen_server()
    found = [(base, base.to_json()) for base in list_bases(home())] if server is None else _there(server)
    bases = [base for base, _ in found]
    if as_json:
        print_json([fields for _, fields in found])
    elif not bases:
        echo("No bases yet. Add one: qhub base add NAME SOURCE")
    else:
        columns = ("base", "architecture", "parameters", "size", "chat template", "fingerprint")
        rows = [
            (base.name, base.architecture, f"{base.num_parameters / 1e6:.1f} M", size_text(base.size),
             "yes" if base.has_chat_template else "no", base.fingerprint[:19])
            for base in bases
        ]  # fmt: skip
        print_table(columns, rows)


@command.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, as_json: bool) -> None:
    """Show one base."""
    from adapterhub_local.base.bases import find_base

    server = chosen_server()
    if server is None:
        base = find_base(name, home())
        found = base.to_json()
    else:
        known = {base.name: (base, found) for base, found in _there(server)}
        if name not in known:
            raise NotFound(f"there is no base '{name}' at {server.url}: it has {', '.join(known) or 'none'}")
        base, found = known[name]
    if as_json:
        print_json(found)
        return
    source = f"{base.hub_id}@{base.revision}" if base.hub_id and base.revision else base.source
    title = base.kind.title
    rows = [
        ("architecture", base.architecture),
        ("parameters", f"{base.num_parameters:,}, of which {base.num_quantised:,} in {title}"),
        ("bits", f"{base.bits_per_weight:.3f} per {title} weight, {base.bits_per_parameter:.3f} per parameter"),
        ("size", f"{size_text(base.size)} on disk"),
        ("context", f"{base.max_length:,} tokens" if base.max_length else "not stated"),
        ("chat template", _template_text(base)),
        ("fingerprint", base.fingerprint),
        *([("source", source)] if server is None else []),
        ("Hub id", base.hub_id or "none"),
        *([("not read back", base.not_read_back)] if base.not_read_back else []),
        *([("left out", ", ".join(base.left_out))] if base.left_out else []),
        ("added", base.created_at),
        *([("folder", base.folder)] if server is None else []),
    ]
    print_table(("base", base.name), rows)


@command.command()
@click.argument("name")
def path(name: str) -> None:
    """Print the folder of a base, which AutoModelForCausalLM.from_pretrained loads (but for mixtures of experts)."""
    check_here("base path")
    from adapterhub_local.base.bases import find_base
    from adapterhub_local.base.mixtures import ARCHITECTURES

    base = find_base(name, home())
    if base.architecture in ARCHITECTURES:
        echo("transformers has no experts in 4 bits: `load_base` of adapterhub_local loads this folder", err=True)
    echo(base.folder)


@command.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Remove it although adapters need it.")
def rm(name: str, force: bool) -> None:
    """Remove a base; refused while adapters need it."""
    check_here("base rm")
    from adapterhub_local.base.bases import remove_base

    info = remove_base(name, home(), force=force)
    echo(f"removed base {name}: {size_text(info.size)} freed")


def _there(server: Server) -> list[tuple[BaseInfo, dict[str, Any]]]:
    """The bases that a server has, and what it says of each: all but where they lie and came from on its machine."""
    own = [field.name for field in dataclasses.fields(BaseInfo) if field.name not in ("folder", "source")]
    return [
        (BaseInfo(**{name: found[name] for name in own if name in found}, folder=Path(), source=""), found)
        for found in server.get("/registry/bases")["data"]
        if found["is_here"]
    ]


def _template_text(base: BaseInfo) -> str:
    if base.chat_template:
        return f"{base.chat_template}, which it was given"
    return "present" if base.has_chat_template else "not present: chat data and chat requests need one"


def _is_hub_id(source: str) -> bool:
    """ORG/NAME with an optional @REVISION, not something meant as a path."""
    name = source.partition("@")[0]
    return name.count("/") == 1 and not source.startswith((".", "/", "~")) and not name.endswith((".gguf", "/"))
