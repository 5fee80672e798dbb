"""`qhub sign`: sign a version with a key."""

from pathlib import Path

import click

from adapterhub_local.cli.output import echo
from adapterhub_local.registry import Registry


@click.command(name="sign")
@click.argument("reference")
@click.option(
    "--key", type=click.Path(path_type=Path), required=True, help="The private key, elliptic curve, a PEM file."
)
@click.option("--ask-password", is_flag=True, help="Ask for the key's password.")
def command(reference: str, key: Path, ask_password: bool) -> None:
    """Sign weights and config of the version REFERENCE names, in the format of OpenSSF Model Signing.

    \b
    openssl ecparam -name prime256v1 -genkey -noout -out private.pem
    openssl ec -in private.pem -pubout -out public.pem
    qhub sign sentiment@1 --key private.pem
    qhub verify sentiment@1 --key public.pem

    `qhub push` sends the signature along. With QHUB_TRUSTED_KEYS=public.pem, `qhub pull` takes in nothing that
    is not signed with one of these keys.
    """
    from adapterhub_local.registry.signature import sign

    registry = Registry()
    version = registry.resolve(reference)
    password = click.prompt("Password of the key", hide_input=True, err=True) if ask_password else None
    echo(f"{version} signed: {sign(registry, version, key, password=password)}")
