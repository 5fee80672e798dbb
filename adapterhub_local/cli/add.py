"""`qhub add`: register an adapter trained elsewhere."""

from pathlib import Path

import click

from adapterhub_local.cli.output import echo, print_json
from adapterhub_local.cli.show import compatibility_text
from adapterhub_local.registry import Registry
from adapterhub_local.registry.as_json import whole
from adapterhub_local.settings import home


@click.command(name="add")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="The name to register it under.")
@click.option("--base", "base_name", help="The base it was trained for; needed if there are several.")
@click.option("--alias", help="Alias to point to the new version.")
@click.option("--alpha", type=float, help="The alpha of a file that does not carry its config.")
@click.option("--force", is_flag=True, help="Register it although it was made for another base; it is recorded.")
@click.option("--json", "as_json", is_flag=True, help="Print the version as JSON.")
def command(
    path: Path, name: str, base_name: str | None, alias: str | None, alpha: float | None, force: bool, as_json: bool
) -> None:
    """Register the adapter at PATH: a PEFT folder, one .safetensors file (kohya's and diffusers' names too), or GGUF.

    How far it fits the base is told and kept: `exact` if its file names this very base by fingerprint, `shapes`
    if all its modules are there in their shapes. One that does not fit, or names another base, is refused.
    """
    from adapterhub_local.base.bases import choose_base
    from adapterhub_local.durable import staging
    from adapterhub_local.refs import check_alias, check_name

    check_name(name)
    if alias is not None:
        check_alias(alias)
    base = choose_base(base_name, home(), "the adapter")
    from adapterhub_local.adopt import adopt
    from adapterhub_local.base.shapes import check_shapes
    from adapterhub_local.export.foreign import convert, is_foreign
    from adapterhub_local.lora.adapter import open_adapter

    source = path
    if is_foreign(path):  # GGUF, or other tools' names of tensors; the folder goes when the command is done
        converted = click.get_current_context().with_resource(staging(home().tmp)) / path.name
        path, alpha = convert(path, base, converted, alpha=alpha), None
    check_shapes(open_adapter(path, alpha=alpha, dora=True), base)
    with staging(home().tmp) as folder:
        version = adopt(
            path, name, Registry(), base.lineage(), alpha=alpha, force=force, alias=alias, staging_folder=folder,
            source=source,
        )  # fmt: skip
    rank, said = version.lineage["adapter"]["rank"], version.lineage["compatibility"]
    if as_json:
        print_json({**whole(version), "compatibility": said})
        return
    echo(f"{version}: rank {rank}, for base {base.name} ({compatibility_text(said)})")
