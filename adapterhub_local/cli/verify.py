"""`qhub verify`: the bytes of versions, hashed again."""

from pathlib import Path

import click

from adapterhub_local.cli.output import counting, echo, print_json, print_table
from adapterhub_local.errors import Corrupt, InputError, NotFound
from adapterhub_local.registry import Registry, Version


@click.command(name="verify")
@click.argument("references", nargs=-1)
@click.option(
    "--key", "keys", type=click.Path(path_type=Path), multiple=True,
    help="Check the signatures too, made with this public key; may be given again.",
)  # fmt: skip
@click.option("--explain", is_flag=True, help="Show each link down to the data, and whether it holds.")
@click.option("--data", type=click.Path(path_type=Path), metavar="FOLDER", help="With --explain: where data files are.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    references: tuple[str, ...], keys: tuple[Path, ...], explain: bool, data: Path | None, as_json: bool
) -> None:  # fmt: skip
    """Hash the files, lineage and manifest of REFERENCES again; of all versions if none is named.

    With --key each must be signed (`qhub sign`) with one of the keys. With --explain nothing needs to be signed,
    but what is must hold: signature, attestation (`qhub attest`), recipe, data, base and parents are shown one by one.
    """
    from adapterhub_local.registry.fsck import verify

    registry = Registry()
    if data is not None and not explain:
        raise InputError("--data goes with --explain")
    if explain:
        _explain(registry, [registry.resolve(text) for text in references], keys, data, as_json)
        return
    versions = [registry.resolve(text) for text in references] if references else registry.versions()
    problems = []
    with counting("verifying") as progress:
        for index, version in enumerate(versions):
            found = [(version, problem.kind, problem.message) for problem in verify(registry, version)]
            if keys and not found:
                found = _unsigned(registry, version, keys)
            problems += found
            progress(index + 1, len(versions))
    rows = [(str(version), kind, message) for version, kind, message in problems]
    if as_json:
        bodies = [{"reference": version, "problem": kind, "message": message} for version, kind, message in rows]
        print_json({"versions": [str(version) for version in versions], "problems": bodies})
    elif problems:
        print_table(("version", "problem", "what"), rows)
    if problems:
        raise Corrupt(f"{len({version for version, *_ in rows})} of {len(versions)} versions are not sound")
    if not as_json:
        signed = f", signed with {' or '.join(key.name for key in keys)}" if keys else ""
        echo(f"{len(versions)} version{'' if len(versions) == 1 else 's'} verified{signed}")


def _unsigned(registry: Registry, version: Version, keys: tuple[Path, ...]) -> list[tuple[Version, str, str]]:
    from adapterhub_local.registry.signature import verify_signature

    try:
        verify_signature(registry, version, keys)
    except (Corrupt, NotFound) as error:
        if isinstance(error, NotFound) and not all(key.is_file() for key in keys):
            raise
        return [(version, "signature", str(error))]
    return []


def _explain(
    registry: Registry, versions: list[Version], keys: tuple[Path, ...], data: Path | None, as_json: bool
) -> None:  # fmt: skip
    from adapterhub_local.registry.chain import chain

    if not versions:
        raise InputError("--explain is about versions: name one, such as sentiment@4")
    links = [link for version in versions for link in chain(registry, version, keys, data)]
    if as_json:
        print_json([link.to_json() for link in links])
    else:
        print_table(
            ("version", "link", "state", "what"), [(one.version, one.about, one.state, one.what) for one in links]
        )
    if broken := [link for link in links if link.state == "broken"]:
        plural = "" if len(broken) == 1 else "s"
        raise Corrupt(f"{len(broken)} link{plural} of the chain {'does' if not plural else 'do'} not hold")
