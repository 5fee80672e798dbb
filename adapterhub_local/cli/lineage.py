"""`qhub lineage`: what a version was made of."""

import click

from adapterhub_local.cli.output import echo
from adapterhub_local.registry import Registry
from adapterhub_local.visible import visible_line


@click.command(name="lineage")
@click.argument("reference")
@click.option("--mermaid", "form", flag_value="mermaid", help="As a Mermaid flow chart.")
@click.option("--dot", "form", flag_value="dot", help="As a Graphviz graph.")
def command(reference: str, form: str | None) -> None:
    """Show what the version REFERENCE names was made of: parents with weights, or data, down to the leaves."""
    from adapterhub_local.registry import ancestry

    registry = Registry()
    version = registry.resolve(reference)
    tree = ancestry.ancestry(registry, version)
    draw = {"mermaid": ancestry.mermaid, "dot": ancestry.dot}.get(form or "", ancestry.text)
    for line in draw(tree):
        echo(visible_line(line))
    if form is None and (made := ancestry.children(registry, version)):
        echo(f"merged into {', '.join(made)}")
