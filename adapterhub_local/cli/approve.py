"""`qhub approve`: approve a version for a protected alias."""

import click

from adapterhub_local.cli.output import echo, print_json
from adapterhub_local.client import chosen_server
from adapterhub_local.registry import Registry


@click.command(name="approve")
@click.argument("reference")
@click.option("--for", "alias", required=True, metavar="ALIAS", help="The alias that it may be moved to.")
@click.option("--withdraw", is_flag=True, help="Take your approval back.")
@click.option("--json", "as_json", is_flag=True, help="Print its approvals as JSON.")
def command(reference: str, alias: str, withdraw: bool, as_json: bool) -> None:
    """Approve the version that REFERENCE names for an alias, which somebody else may then move to it.

    \b
    qhub approve sentiment@4 --for prod
    An approval is of these very bytes and their lineage. Whoever moves the alias does not count as an approver.
    """
    from adapterhub_local.registry.protecting import approve

    if (server := chosen_server()) is not None:
        body = {"reference": reference, "alias": alias, "withdraw": withdraw}
        found = server.post("/registry/approvals", body)
    else:
        registry = Registry()
        version = registry.resolve(reference)
        given = approve(registry, version, alias, is_given=not withdraw)
        found = {"reference": str(version), "alias": alias, "approvals": [vars(one) for one in given]}
    if as_json:
        print_json(found)
        return
    names = ", ".join(one["actor"] for one in found["approvals"]) or "nobody"
    echo(f"{found['reference']} is approved for {alias} by {names}")
