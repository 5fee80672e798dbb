"""`qhub merge`: adapters become one adapter, by exact weighted sum."""

from pathlib import Path

import click

from adapterhub_local.cli.output import print_json
from adapterhub_local.registry import Registry


@click.command(name="merge")
@click.argument("adapters", nargs=-1, required=True)
@click.option("--weights", required=True, metavar="W1,W2,...", help="One weight for each adapter; may be negative.")
@click.option("--name", help="Register the result as the next version of NAME.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write one .safetensors file, or else a PEFT folder."
)
@click.option("--alias", help="With --name: alias to point to the new version.")
@click.option("--alpha", type=float, help="The alpha of files that do not carry their config.")
@click.option("--force", is_flag=True, help="Merge adapters of different bases; it is recorded.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    adapters: tuple[str, ...],
    weights: str,
    name: str | None,
    output: Path | None,
    alias: str | None,
    alpha: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Merge ADAPTERS (files, PEFT folders or references) into their exact weighted sum.

    \b
    qhub merge a.safetensors b.safetensors --weights 0.7,0.3
    qhub merge sentiment@1 origin@1 --weights 0.7,0.3 --name both

    Without --name or -o the result is written beside you, as a+b.safetensors.
    """
    from adapterhub_local.durable import check_absent
    from adapterhub_local.errors import InputError
    from adapterhub_local.refs import check_alias, check_name, parse_weight

    parsed = [parse_weight(weight) for weight in weights.split(",")]
    if name is not None and output is not None:
        raise InputError("--name and -o exclude each other: give one")
    if alias is not None and name is None:
        raise InputError("--alias needs --name: only a registered version can have an alias")
    if name is not None:
        check_name(name)
    if alias is not None:
        check_alias(alias)
    if name is None:
        stems = [Path(label).name.removesuffix(".safetensors").replace("@", "-") for label in adapters]
        output = check_absent(output or Path("+".join(stems) + ".safetensors"))
    from adapterhub_local.merge.plan import make_plan
    from adapterhub_local.merge.run import merge_to_path, merge_to_registry

    registry = Registry()
    plan = make_plan(adapters, parsed, registry, alpha=alpha, force=force)
    if output is not None:
        report = merge_to_path(plan, output).to_json()
        made = {"output": str(output)}
    else:
        assert name is not None, "there is a name or an output"
        version = merge_to_registry(plan, registry, name, alias=alias)
        report = dict(version.lineage["merge"])
        made = {"reference": str(version), "content_digest": version.content_digest}
    if as_json:
        print_json({**made, **report})
        return
    click.echo(
        f"{next(iter(made.values()))}: weighted sum of {len(adapters)} adapters, rank {report['rank']}, "
        f"{report['num_modules']} modules, relative error {report['relative_error']:.1e}"
    )
    if report["kept"] < 0.1:
        click.echo(f"warning: the adapters cancel each other out, {report['kept']:.1%} of their size is left", err=True)
    if abs(sum(parsed) - 1) > 1e-9:
        click.echo(f"note: the weights sum to {sum(parsed):g}", err=True)
