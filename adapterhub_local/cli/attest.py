"""`qhub attest`: sign where a version comes from."""

import os
from pathlib import Path

import click

from adapterhub_local.cli.output import echo
from adapterhub_local.durable import check_absent, place_file, staging
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry


@click.command(name="attest")
@click.argument("reference")
@click.option("--key", type=click.Path(path_type=Path), help="The private key, elliptic curve, a PEM file.")
@click.option("--ask-password", is_flag=True, help="Ask for the key's password.")
@click.option("--ml-bom", is_flag=True, help="Write a CycloneDX bill of materials instead, which needs no key.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write it to this file too; - prints it.")
def command(reference: str, key: Path | None, ask_password: bool, ml_bom: bool, output: Path | None) -> None:
    """Sign recipe, data digests, base fingerprint, parents and packages of a version: an in-toto statement (SLSA).

    \b
    qhub attest sentiment@4 --key private.pem -o sentiment.intoto.json
    qhub verify sentiment@4 --key public.pem --explain
    qhub attest sentiment@4 -o -                 # what would be signed, or what was, as JSON
    qhub attest sentiment@4 --ml-bom -o sentiment.cdx.json
    cosign verify-blob-attestation --key public.pem --insecure-ignore-tlog --type slsaprovenance1 \\
        --signature sentiment.intoto.json adapter_model.safetensors

    Keys are those of `qhub sign`; the envelope (DSSE) is kept beside the registry. Works offline.
    """
    from adapterhub_local.registry.attest import statement
    from adapterhub_local.visible import visible_json

    registry = Registry()
    version = registry.resolve(reference)
    if ml_bom and key is not None:
        raise InputError("a bill of materials is not signed: leave --key out")
    if key is None and output is None:
        raise InputError(
            "say with which key to sign (--key PRIVATE.pem), or where to write what would be signed (-o FILE)"
        )
    if output is not None and str(output) != "-":
        check_absent(output)
    if key is not None:
        from adapterhub_local.registry.envelope import attest

        password = click.prompt("Password of the key", hide_input=True, err=True) if ask_password else None
        text = attest(registry, version, key, password=password).decode()
        echo(f"{version} attested", err=output is not None)
    else:
        import json

        from adapterhub_local.registry.ml_bom import ml_bom as bill

        text = json.dumps(bill(registry, version) if ml_bom else statement(version), indent=2, ensure_ascii=False)
    if output is None:
        return
    if str(output) == "-":
        echo(visible_json(text))
        return
    with staging(output.absolute().parent, f".{os.getpid()}-") as stage:
        (stage / "file").write_text(text + "\n", encoding="utf-8")
        place_file(stage / "file", output)
    echo(f"wrote {output}", err=True)
