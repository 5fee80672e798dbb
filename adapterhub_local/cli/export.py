"""`qhub export`: a version in the formats that other tools read."""

from pathlib import Path

import click

from adapterhub_local.cli.output import counting, echo, print_json
from adapterhub_local.durable import check_absent
from adapterhub_local.errors import InputError
from adapterhub_local.export.formats import FORMATS, TYPES, Request, export
from adapterhub_local.registry import Registry
from adapterhub_local.registry.kinds import check_adapter

HELP = f"""Write the version REFERENCE names for other tools, or with its lineage to one tar.

\b
{chr(10).join(f"--to {row.name:11} {row.summary}" for row in FORMATS.values())}

\b
qhub export sentiment -o sentiment.safetensors
qhub export sentiment --to fused-gguf --type q8_0 -o sentiment.gguf
qhub export both --oci both.tar       with its parents, for `qhub import`
"""


@click.command(name="export", help=HELP)
@click.argument("reference")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file or folder to write.")
@click.option("--to", "form", type=click.Choice(list(FORMATS)), default="file", show_default=True, help="The format.")
@click.option(
    "--oci", type=click.Path(path_type=Path), metavar="PATH", help="The .tar file to write, for `qhub import`."
)
@click.option("--base", "base_name", metavar="BASE", help="The base here, if the version does not know its own.")
@click.option("--type", "kind", type=click.Choice(TYPES), help="fused-gguf, ollama: the type of the weights.  [f16]")
@click.option(
    "--vocabulary", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE.gguf",
    help="fused-gguf, ollama: take the vocabulary of this GGUF of the same model.",
)  # fmt: skip
@click.option("--onto", metavar="MODEL", help="fused: add to this 16-bit model (folder, .gguf, Hub id) instead.")
@click.option("--requantise", metavar="NAME", help="fused: make a 4-bit base NAME of it too, report the loss.")
@click.option("--no-check", is_flag=True, help="fused: skip the comparison with base and adapter before it is kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    reference: str,
    output: Path | None,
    form: str,
    oci: Path | None,
    base_name: str | None,
    kind: str | None,
    vocabulary: Path | None,
    onto: str | None,
    requantise: str | None,
    no_check: bool,
    as_json: bool,
) -> None:
    if oci is not None and output is not None:
        raise InputError("-o and --oci exclude each other: give one")
    registry = Registry()
    if oci is not None:
        from adapterhub_local.registry.archive import write_archive

        check_absent(oci)
        versions = write_archive(registry, registry.resolve(reference), oci)
        _show({"versions": [str(version) for version in versions], "output": str(oci)}, "", as_json)
        return
    if output is None:
        raise InputError("Missing option '-o' or '--oci': name the file to write")
    version = check_adapter(registry.resolve(reference))
    with counting(f"exporting {version}") as progress:
        request = Request(
            version, registry.home, output, base_name, onto, requantise, kind, vocabulary,
            check=not no_check, progress=progress,
        )  # fmt: skip
        written = export(request, form)
    report = {"versions": [str(version)], "format": form, "output": str(output), **written.report}
    if written.notes:
        report["notes"] = list(written.notes)
    _show(report, written.text, as_json)
    for note in written.notes:
        echo(f"note: {note}", err=True)


def _show(report: dict[str, object], text: str, as_json: bool) -> None:
    if as_json:
        print_json(report)
    else:
        versions = report["versions"]
        assert isinstance(versions, list)
        echo(f"{', '.join(versions)} -> {report['output']}" + (f": {text}" if text else ""))
