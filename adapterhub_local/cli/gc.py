"""`qhub gc`: free the space that nothing needs."""

import time
from typing import TYPE_CHECKING

import click

from adapterhub_local.cli.output import counting, echo, print_json, print_table, size_text
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry

if TYPE_CHECKING:
    from adapterhub_local.registry.retention import Retention


@click.command(name="gc")
@click.option("--apply", is_flag=True, help="Do it; without it, only report what would be done.")
@click.option("--grace", type=click.FloatRange(0), default=3600, show_default=True, metavar="SECONDS",
              help="Keep what is younger: it may belong to a version being published.")  # fmt: skip
@click.option("--purge-after", type=click.FloatRange(0), default=7 * 24 * 3600, show_default=True, metavar="SECONDS",
              help="Delete what has been in quarantine for longer than this.")  # fmt: skip
@click.option("--keep", type=click.IntRange(1), metavar="N",
              help="First remove all but the N newest versions of each name, except what something needs.")  # fmt: skip
@click.option("--keep-aliased", is_flag=True, help="Do not count versions with an alias among these N.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    apply: bool, grace: float, purge_after: float, keep: int | None, keep_aliased: bool, as_json: bool
) -> None:  # fmt: skip
    """Set blobs that no version needs aside into quarantine/, and delete what has been there for long.

    With --keep old versions are removed first, as `qhub rm` does. What an alias points to or would roll back to, what a
    running server uses, and what a kept version was merged from always stays.
    """
    from adapterhub_local.registry.gc import collect
    from adapterhub_local.registry.retention import choose, retire

    if keep is None and keep_aliased:
        raise InputError("--keep-aliased goes with --keep N")
    registry = Registry()
    retention = None
    if keep is not None:
        retention = choose(registry, keep, aliased_apart=keep_aliased, clock=time.time())
        if apply:
            with counting("removing") as progress:
                retention = retire(registry, retention, progress)
    done = collect(registry, apply=apply, grace=grace, purge=purge_after)
    if as_json:
        print_json(vars(done) | ({"retention": retention.to_json()} if retention is not None else {}))
        return
    if retention is not None:
        _show(retention, apply)
    moved, deleted = ("set aside", "deleted") if apply else ("would be set aside", "would be deleted")
    echo(f"{done.num_blobs} blobs ({size_text(done.blob_bytes)}) {moved}")
    echo(f"{done.num_purged} files of quarantine ({size_text(done.purged_bytes)}) and {done.num_temporary} "
               f"leftovers {deleted}{'' if apply else ': --apply does it'}")  # fmt: skip


def _show(retention: "Retention", applied: bool) -> None:
    word = "removed" if applied else "would be removed"
    rows = [(str(version), word) for version in retention.drop]
    rows += [(name, f"kept: {why}") for name, why in retention.keep.items() if "newest" not in why]
    if rows:
        print_table(("version", "what"), rows)
    for line in retention.refused:
        echo(f"kept, as it is needed by now: {line}")
    echo(f"{len(retention.drop)} versions ({size_text(retention.num_bytes)} that nothing else needs) {word}, "
         f"{len(retention.keep)} kept")  # fmt: skip
