"""`qhub fsck`: is the registry intact?"""

from pathlib import Path

import click

from adapterhub_local.cli.output import counting, echo, print_json, print_table
from adapterhub_local.errors import Corrupt
from adapterhub_local.registry import Registry


@click.command(name="fsck")
@click.option(
    "--repair",
    is_flag=True,
    help="Set damaged blobs aside, write again what the database holds, and register what it does not know.",
)
@click.option("--rebuild-db", is_flag=True, help="First make the database again from the manifests.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(repair: bool, rebuild_db: bool, as_json: bool) -> None:
    """Check the registry: hash every blob, read every header, hold the database against the manifests.

    Exit code 1 if something is wrong and was not repaired. What --repair sets aside is in the home's
    quarantine/; versions that lost a file stay listed and refuse to load.
    """
    from adapterhub_local.registry.fsck import fsck
    from adapterhub_local.registry.rebuild import rebuild

    registry = Registry()
    rebuilt = rebuild(registry) if rebuild_db else None
    with counting("checking") as progress:
        report = fsck(registry, repair=repair, progress=progress)
    rebuilt = rebuilt or report.rebuilt
    if as_json:
        print_json({
            "blobs": report.num_blobs, "versions": report.num_versions, "unreferenced": report.num_unreferenced,
            "clean": report.is_clean, "problems": [vars(problem) for problem in report.problems],
            "unfinished": report.unfinished,
            "rebuilt": vars(rebuilt) if rebuilt else None,
        })  # fmt: skip
    else:
        if rebuilt:
            echo(f"database made again: {rebuilt.num_versions} versions, {rebuilt.num_evaluations} evaluations")
            for line in rebuilt.moved:
                echo(f"renumbered: {line}", err=True)
            for line in rebuilt.lost:
                echo(f"lost: {line}", err=True)
        if report.problems:
            rows = [(found.kind, found.subject, found.message, found.repaired) for found in report.problems]
            print_table(("problem", "where", "what", "repaired"), rows)
        hint = " (`qhub gc`)" if report.is_repaired else ""
        unused = f", {report.num_unreferenced} unreferenced{hint}" if report.num_unreferenced else ""
        echo(f"{report.num_versions} versions, {report.num_blobs} blobs{unused}")
        if report.unfinished:
            _note_unfinished(report.unfinished, registry.home.ledger)
    if not report.is_repaired:
        wrong = sum(problem.repaired is None for problem in report.problems)
        hint = "" if repair else ": `qhub fsck --repair` repairs what it can"
        raise Corrupt(f"{wrong} problem{'' if wrong == 1 else 's'} in {registry.home.root}{hint}")


def _note_unfinished(references: list[str], ledger: Path) -> None:
    shown = ", ".join(references[:8]) + (f" and {len(references) - 8} more" if len(references) > 8 else "")
    echo(
        f"note: the blobs hold {shown}, of which neither the database nor {ledger.name} knows: a publish was cut off, "
        f"or both files came back from a backup of an older qhub. If they did, move {ledger} away and run "
        "`qhub fsck --repair` before anything is published",
        err=True,
    )
