"""`qhub export`: a version as one file that says all about itself."""

import shutil
from pathlib import Path

import click

from adapterhub_local.durable import check_absent, place_file, staging
from adapterhub_local.errors import InputError
from adapterhub_local.lora.config import WEIGHTS
from adapterhub_local.registry import Registry


@click.command(name="export")
@click.argument("reference")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The .safetensors file to write.")
def command(reference: str, output: Path) -> None:
    """Write the version REFERENCE names to one .safetensors file.

    The adapter's config and the fingerprint of its base are in the file's header, so `qhub merge` and
    `qhub add` need nothing else.
    """
    if output.suffix != ".safetensors":
        raise InputError(f"{output} must end in .safetensors")
    check_absent(output)
    version = Registry().resolve(reference)
    with staging(output.absolute().parent, prefix=".qhub-") as stage:
        shutil.copyfile(version.path / WEIGHTS, stage / WEIGHTS)
        place_file(stage / WEIGHTS, output)
    click.echo(f"{version} -> {output}")
