"""`qhub gc`: give back the space of what nothing needs."""

import click

from adapterhub_local.cli.output import echo, print_json, size_text
from adapterhub_local.registry import Registry


@click.command(name="gc")
@click.option("--apply", is_flag=True, help="Do it; without it, only report what would be done.")
@click.option("--grace", type=click.FloatRange(0), default=3600, show_default=True, metavar="SECONDS",
              help="Keep what is younger: it may belong to a version being published.")  # fmt: skip
@click.option("--purge-after", type=click.FloatRange(0), default=7 * 24 * 3600, show_default=True, metavar="SECONDS",
              help="Delete for good what has been in quarantine so long.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(apply: bool, grace: float, purge_after: float, as_json: bool) -> None:
    """Set blobs that no version needs aside into quarantine/, and delete what has been there for long."""
    from adapterhub_local.registry.gc import collect

    done = collect(Registry(), apply=apply, grace=grace, purge=purge_after)
    if as_json:
        print_json(vars(done))
        return
    moved, deleted = ("set aside", "deleted") if apply else ("would be set aside", "would be deleted")
    echo(f"{done.num_blobs} blobs ({size_text(done.blob_bytes)}) {moved}")
    echo(f"{done.num_purged} files of quarantine ({size_text(done.purged_bytes)}) and {done.num_temporary} "
               f"leftovers {deleted}{'' if apply else ': --apply does it'}")  # fmt: skip
