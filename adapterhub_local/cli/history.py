"""`qhub history`: everything that changed, newest first, and who changed it."""

import click

from adapterhub_local.cli.output import echo, print_json, print_table
from adapterhub_local.client import PAGE, chosen_server
from adapterhub_local.registry import Registry


@click.command(name="history")
@click.argument("name", required=False)
@click.option("--event", "events", multiple=True, metavar="KIND", help="Only such changes: alias, version, removal ...")
@click.option("--actor", metavar="WHO", help="Only what WHO did.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most.")
@click.option("--after", metavar="PLACE", help="Continue where a page ended.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with `after` where there is more.")
def command(
    name: str | None, events: tuple[str, ...], actor: str | None, limit: int, after: str | None, as_json: bool
) -> None:
    """Show what changed in the home, or of NAME alone: versions, aliases, tags, evaluations, approvals, keys.

    An actor is the API key where a server made the change, else QHUB_ACTOR, else the user and the machine.
    """
    if (server := chosen_server()) is not None:
        asked = {"name": name, "event": events, "actor": actor}
        found = server.get("/registry/history", **asked, after=after, limit=min(limit, PAGE))
        entries, following = found["data"], found["after"]
    else:
        from adapterhub_local.registry.history import history

        page = history(Registry(), name=name, events=events, actor=actor, after=after, limit=limit)
        entries, following = page.entries, page.after
    if as_json:
        print_json({"changes": entries, "after": following})
        return
    rows = [(entry["at"][:19].replace("T", " "), entry["actor"] or "unknown", entry["what"]) for entry in entries]
    if not rows:
        echo("Nothing changed yet." if after is None and name is None else "Nothing.")
        return
    print_table(("when", "who", "what"), rows)
    if following is not None:
        echo(f"older changes: --after {following}", err=True)
