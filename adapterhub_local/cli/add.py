"""`qhub add`: register an adapter trained elsewhere."""

from pathlib import Path

import click

from adapterhub_local.cli.output import echo, note_taken_in, print_json
from adapterhub_local.cli.show import compatibility_text
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry
from adapterhub_local.registry.as_json import whole
from adapterhub_local.settings import home


@click.command(name="add")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="The name to register it under.")
@click.option("--base", "base_name", help="The base it was trained for; needed if there are several.")
@click.option("--alias", help="Alias to point to the new version.")
@click.option("--alpha", type=float, help="The alpha of a file that does not say its scale.")
@click.option("--force", is_flag=True, help="Register it although it was made for another base; it is recorded.")
@click.option("--json", "as_json", is_flag=True, help="Print the version as JSON.")
def command(
    path: Path, name: str, base_name: str | None, alias: str | None, alpha: float | None, force: bool, as_json: bool
) -> None:
    """Register the adapter at PATH: a PEFT or MLX-LM folder, a .safetensors file (kohya's names too), or GGUF.

    How far it fits the base is printed and kept: `exact` if its file names this very base by fingerprint, `named` if
    by its id on the Hub, `shapes` if all its modules are there in their shapes. One that does not fit is refused, and
    one that names another base is, unless --base confirms it. Weights of the base that were saved along are left out.
    """
    from adapterhub_local.base.bases import choose_base
    from adapterhub_local.durable import staging
    from adapterhub_local.refs import check_alias, check_name

    check_name(name)
    if ":/" in str(path)[:8] and not path.exists():  # of `https://`, as a path has it
        raise InputError(f"{path} is an address: `qhub pull ORG/REPO` registers an adapter of the Hugging Face Hub")
    if alias is not None:
        check_alias(alias)
    base = choose_base(base_name, home(), "the adapter")
    from adapterhub_local.adopt import adopt
    from adapterhub_local.export.foreign import convert, is_foreign

    source = path
    if is_foreign(path):  # GGUF, MLX-LM, or other tools' names of tensors; the folder goes when the command is done
        converted = click.get_current_context().with_resource(staging(home().tmp)) / path.name
        path, alpha = convert(path, base, converted, alpha=alpha), None
    with staging(home().tmp) as folder:
        version = adopt(
            path, name, Registry(), base.lineage(), alpha=alpha, force=force, confirmed=base_name is not None,
            alias=alias, staging_folder=folder, source=source, info=base,
        )  # fmt: skip
    rank, compatibility = version.lineage["adapter"]["rank"], version.lineage["compatibility"]
    if as_json:
        print_json({**whole(version), "compatibility": compatibility})
        return
    echo(f"{version}: rank {rank}, for base {base.name} ({compatibility_text(compatibility)})")
    note_taken_in(version)
