"""`qhub approve`: approve a version for a protected alias."""

import click

from adapterhub_local.cli.output import echo, print_json
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

    registry = Registry()
    version = registry.resolve(reference)
    given = approve(registry, version, alias, is_given=not withdraw)
    if as_json:
        print_json({"reference": str(version), "alias": alias, "approvals": [vars(one) for one in given]})
        return
    names = ", ".join(one.actor for one in given) or "nobody"
    echo(f"{version} is approved for {alias} by {names}")
