"""`qhub lineage`: what a version was made of."""

import click

from adapterhub_local.cli.output import echo, print_json
from adapterhub_local.client import chosen_server
from adapterhub_local.registry import Registry
from adapterhub_local.visible import visible_line


@click.command(name="lineage")
@click.argument("reference")
@click.option("--mermaid", "form", flag_value="mermaid", help="As a Mermaid flow chart.")
@click.option("--dot", "form", flag_value="dot", help="As a Graphviz graph.")
@click.option("--json", "as_json", is_flag=True, help="Print nodes and edges as JSON.")
def command(reference: str, form: str | None, as_json: bool) -> None:
    """Show what the version REFERENCE names was made of: parents with weights, or data, down to the leaves."""
    from adapterhub_local.registry import ancestry
    from adapterhub_local.registry.graph import graph, tree_of

    server = chosen_server()
    if server is not None:
        found = server.get(f"/registry/lineage/{reference}")
        tree, made = tree_of(found), found["made_into"]
    else:
        registry = Registry()
        version = registry.resolve(reference)
        tree, made = ancestry.ancestry(registry, version), ancestry.children(registry, version)
    if as_json:
        print_json(found if server is not None else graph(registry, version).to_json())
        return
    if server is not None and found["is_cut"]:
        echo(f"note: the nearest {len(found['nodes'])} versions and files; there are more", err=True)
    draw = {"mermaid": ancestry.mermaid, "dot": ancestry.dot}.get(form or "", ancestry.text)
    for line in draw(tree):
        echo(visible_line(line))
    if form is None and made:
        echo(f"merged into {', '.join(made)}")
