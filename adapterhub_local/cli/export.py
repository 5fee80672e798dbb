"""`qhub export`: a version in the formats that other tools read."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub_local.cli.output import counting, echo, print_json, size_text
from adapterhub_local.durable import check_absent, place_file, place_folder, staging
from adapterhub_local.errors import InputError, InUse
from adapterhub_local.lora.config import WEIGHTS
from adapterhub_local.registry import Registry, Version

if TYPE_CHECKING:
    from adapterhub_local.base.source import Source

FORMATS = ("file", "peft", "gguf", "fused", "ollama")


@click.command(name="export")
@click.argument("reference")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file or folder to write.")
@click.option("--to", "form", type=click.Choice(FORMATS), default="file", show_default=True, help="The format.")
@click.option(
    "--oci", type=click.Path(path_type=Path), metavar="PATH", help="The .tar file to write, for `qhub import`."
)
@click.option("--base", "base_name", metavar="BASE", help="The base here, if the version does not know its own.")
@click.option("--from", "from_model", metavar="MODEL", help="ollama: the base as Ollama names it, not written then.")
@click.option("--onto", metavar="MODEL", help="fused: add to this 16-bit model (folder, .gguf, Hub id) instead.")
@click.option("--requantise", metavar="NAME", help="fused: make it a 4-bit base NAME too, and say what that loses.")
@click.option("--no-check", is_flag=True, help="fused: do not hold it against base and adapter before it is kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    reference: str,
    output: Path | None,
    form: str,
    oci: Path | None,
    base_name: str | None,
    from_model: str | None,
    onto: str | None,
    requantise: str | None,
    no_check: bool,
    as_json: bool,
) -> None:
    """Write the version REFERENCE names for other tools, or with its lineage to one tar.

    \b
    qhub export sentiment -o sentiment.safetensors       one file for `qhub merge` and `qhub add`
    qhub export sentiment --to peft -o folder            what PEFT and vLLM load
    qhub export sentiment --to gguf -o sentiment.gguf    llama.cpp: --lora sentiment.gguf
    qhub export sentiment --to fused -o folder           base and adapter as one 16-bit model
    qhub export sentiment --to ollama -o folder          ollama create NAME -f folder/Modelfile
    qhub export both --oci both.tar                      with its parents, for `qhub import`
    """
    if oci is not None and output is not None:
        raise InputError("-o and --oci exclude each other: give one")
    registry = Registry()
    if oci is not None:
        from adapterhub_local.registry.archive import write_archive

        check_absent(oci)
        versions = write_archive(registry, registry.resolve(reference), oci)
        _tell({"versions": [str(version) for version in versions], "output": str(oci)}, "", as_json)
        return
    if output is None:
        raise InputError("Missing option '-o' or '--oci': name the file to write")
    if form != "fused" and (onto or requantise):
        raise InputError("--onto and --requantise are for --to fused")
    suffix = {"file": ".safetensors", "gguf": ".gguf"}.get(form)
    if suffix and output.suffix != suffix:
        raise InputError(f"{output} must end in {suffix}")
    check_absent(output)
    version = registry.resolve(reference)
    said = {"versions": [str(version)], "format": form, "output": str(output)}
    if form == "file":
        with staging(output.absolute().parent, prefix=".qhub-") as stage:
            shutil.copyfile(version.path / WEIGHTS, stage / WEIGHTS)
            place_file(stage / WEIGHTS, output)
        _tell(said, "", as_json)
    elif form == "peft":
        with staging(output.absolute().parent, prefix=".qhub-") as stage:
            place_folder(Path(shutil.copytree(version.path, stage / "adapter")), output)
        _tell(said, "", as_json)
    else:
        made = _with_base(version, form, output, base_name, from_model=from_model, onto=onto, requantise=requantise,
                          check=not no_check)  # fmt: skip
        _tell({**said, **made}, f": {made.pop('told')}", as_json)


def _with_base(
    version: Version, form: str, output: Path, base_name: str | None, *,
    from_model: str | None, onto: str | None, requantise: str | None, check: bool,
) -> dict[str, Any]:  # fmt: skip
    """The formats that need to know the base."""
    from adapterhub_local.base.bases import check_base_name, find_base
    from adapterhub_local.base.shapes import check_shapes
    from adapterhub_local.evaluate.evaluate import base_of
    from adapterhub_local.lora.adapter import open_adapter
    from adapterhub_local.settings import home

    if requantise is not None and (home().bases / check_base_name(requantise)).exists():
        raise InUse(f"base '{requantise}' exists already: choose another name for --requantise")
    base = find_base(base_name, home()) if base_name else base_of(version, home())
    adapter = open_adapter(version.path, dora=True)
    check_shapes(adapter, base)
    if form == "gguf":
        from adapterhub_local.export.gguf import write_gguf

        rank = write_gguf(adapter, base, output, name=str(version), digest=version.content_digest)
        return {"rank": rank, "base": base.name, "told": f"rank and alpha {rank}, for a GGUF of {base.name}"}
    if form == "ollama":
        from adapterhub_local.export.ollama import write_ollama

        digest = version.content_digest
        write_ollama(adapter, base, output, name=str(version), digest=digest, from_model=from_model)
        return {"base": base.name, "told": f"ollama create {version.name.replace('/', '-')} -f {output}/Modelfile"}
    from adapterhub_local.export.divergence import measure
    from adapterhub_local.export.fused import write_fused

    source = _source(onto) if onto is not None else None
    with counting(f"fusing {version}") as progress:
        fused = write_fused(base, adapter, output, progress, onto=source, check=check)
    made: dict[str, Any] = {"base": base.name, "size": fused.size, "relative_rounding": fused.relative_rounding}
    told = f"{size_text(fused.size)}, 16 bits; rounding is {fused.relative_rounding:.1%} of the adapter's size"
    if fused.divergence is not None:
        made["kl"] = vars(fused.divergence)
        told += f"; {fused.divergence}"
    if requantise is not None:
        from adapterhub_local.export.requantise import add_requantised

        new, loss = add_requantised(requantise, output, base, adapter, home(), source_name=f"{version} fused")
        made["requantised"] = {"base": new.name, **vars(loss)}
        told += f"\nbase {new.name}: in 4 bits {loss}"
        if check:
            found = measure(base, version.path, new)
            made["requantised"]["kl"] = vars(found)
            told += f"; {found}"
    return {**made, "told": told}


def _source(text: str) -> "Source":
    """The 16-bit model that --onto names."""
    import os

    from adapterhub_local.base.source import open_source

    path = Path(os.path.expanduser(text))
    if not path.exists() and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        from adapterhub_local.hub.model import fetch_model

        repo_id, _, revision = text.partition("@")
        path = fetch_model(repo_id, revision or None).folder
    return open_source(path)


def _tell(made: dict[str, Any], note: str, as_json: bool) -> None:
    if as_json:
        print_json({key: value for key, value in made.items() if key != "told"})
    else:
        echo(f"{', '.join(made['versions'])} -> {made['output']}{note}")
