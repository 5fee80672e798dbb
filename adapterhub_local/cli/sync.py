"""`qhub sync`: versions to and from a remote."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from adapterhub_local.cli.output import counting, echo, print_json, size_text
from adapterhub_local.registry import Registry

if TYPE_CHECKING:
    from adapterhub_local.registry.sync import Moved


@click.group(name="sync")
def command() -> None:
    """Send versions to a remote or fetch them from it, with what they were merged from."""


@command.command()
@click.argument("remote")
@click.argument("references", metavar="NAME[@V]...", nargs=-1, required=True)
@click.option("--all", "every", is_flag=True, help="All versions of NAME, not only the newest.")
@click.option("--recheck", is_flag=True, help="Read back what was there already, too, and send anew what is damaged.")
@click.option("--dry-run", is_flag=True, help="Tell what would be sent.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def push(remote: str, references: tuple[str, ...], every: bool, recheck: bool, dry_run: bool, as_json: bool) -> None:
    """Send versions to REMOTE; what is there is not sent again, and what was sent is read back and hashed.

    A number that belongs to another version there is not touched: the version gets the next one.
    """
    from adapterhub_local.registry import sync
    from adapterhub_local.registry.remotes import find_remote
    from adapterhub_local.registry.store import open_store

    registry = Registry()
    found = find_remote(registry.home, remote)
    versions = [registry.resolve(text) for text in references]
    if every:
        _check_names(references)
        versions = [one for version in versions for one in registry.versions(version.name)]
    with counting("pushing", in_bytes=True) as progress:
        moved = sync.push(registry, open_store(found), versions, dry_run=dry_run, recheck=recheck, progress=progress)
    _print(found.name, moved, "sent", f"{found.name} ", dry_run, as_json)


@command.command()
@click.argument("remote")
@click.argument("reference", metavar="NAME[@V]")
@click.option("--all", "every", is_flag=True, help="All versions of NAME, not only the newest.")
@click.option("--dry-run", is_flag=True, help="Tell what would be fetched.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull(remote: str, reference: str, every: bool, dry_run: bool, as_json: bool) -> None:
    """Register a version of REMOTE here, after checking every byte; the newest if no number is given.

    It keeps its number if that was never used here, else it gets the next one. The same command again goes
    on where it was interrupted.
    """
    from adapterhub_local.refs import Reference
    from adapterhub_local.registry import sync
    from adapterhub_local.registry.remotes import find_remote
    from adapterhub_local.registry.store import open_store

    registry = Registry()
    wanted = Reference.parse(reference)
    found = find_remote(registry.home, remote)
    if every:
        _check_names((reference,))
    with counting("pulling", in_bytes=True) as progress:
        moved = sync.pull(registry, open_store(found), wanted, every=every, dry_run=dry_run, progress=progress)
    _print(found.name, moved, "fetched", "", dry_run, as_json)


def _check_names(references: tuple[str, ...]) -> None:
    from adapterhub_local.errors import InputError

    for text in references:
        if "@" in text:
            raise InputError(f"--all takes a name, '{text}' is one version: leave out '@...' or --all")


def _print(remote: str, moved: "Sequence[Moved]", done: str, place: str, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json({"remote": remote, "dry_run": dry_run, "versions": [asdict(one) for one in moved]})
        return
    would = "would be " if dry_run else ""
    for one in moved:
        as_what = f" as {place}{one.target}" if one.target != one.source else ""
        if not one.is_new:
            echo(f"{one.source} was there already{as_what}" + (f", {one.num_objects} objects sent anew"
                       if one.num_objects else ""))  # fmt: skip
        else:
            size = f"{one.num_objects} object{'' if one.num_objects == 1 else 's'}, {size_text(one.num_bytes)}"
            echo(f"{one.source} {would}{done}{as_what} ({size})")
