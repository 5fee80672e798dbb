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
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The .safetensors file to write.")
@click.option(
    "--oci", type=click.Path(path_type=Path), metavar="PATH", help="The .tar file to write, for `qhub import`."
)
def command(reference: str, output: Path | None, oci: Path | None) -> None:
    """Write the version REFERENCE names to one .safetensors file, or with its lineage to one tar.

    The adapter's config and the fingerprint of its base are in the .safetensors file's header, so `qhub
    merge` and `qhub add` need nothing else. The tar is an OCI image layout; parents of a merge are in it too.
    """
    if oci is not None and output is not None:
        raise InputError("-o and --oci exclude each other: give one")
    if oci is not None:
        from adapterhub_local.registry.archive import write_archive

        registry = Registry()
        check_absent(oci)
        versions = write_archive(registry, registry.resolve(reference), oci)
        click.echo(f"{', '.join(str(version) for version in versions)} -> {oci}")
        return
    if output is None:
        raise InputError("Missing option '-o' or '--oci': name the file to write")
    if output.suffix != ".safetensors":
        raise InputError(f"{output} must end in .safetensors")
    check_absent(output)
    version = Registry().resolve(reference)
    with staging(output.absolute().parent, prefix=".qhub-") as stage:
        shutil.copyfile(version.path / WEIGHTS, stage / WEIGHTS)
        place_file(stage / WEIGHTS, output)
    click.echo(f"{version} -> {output}")
