"""`qhub verify`: the bytes of versions, hashed again."""

import click

from adapterhub_local.cli.output import counting, print_json, print_table
from adapterhub_local.errors import Corrupt
from adapterhub_local.registry import Registry


@click.command(name="verify")
@click.argument("references", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(references: tuple[str, ...], as_json: bool) -> None:
    """Hash the files, lineage and manifest of REFERENCES again; of all versions if none is named."""
    from adapterhub_local.registry.fsck import verify

    registry = Registry()
    versions = [registry.resolve(text) for text in references] if references else registry.versions()
    problems = []
    with counting("verifying") as progress:
        for index, version in enumerate(versions):
            problems += [(version, problem) for problem in verify(registry, version)]
            progress(index + 1, len(versions))
    rows = [(str(version), problem.kind, problem.message) for version, problem in problems]
    if as_json:
        found = [{"reference": version, "problem": kind, "message": message} for version, kind, message in rows]
        print_json({"versions": [str(version) for version in versions], "problems": found})
    elif problems:
        print_table(("version", "problem", "what"), rows)
    if problems:
        raise Corrupt(f"{len({version for version, *_ in rows})} of {len(versions)} versions are not sound")
    if not as_json:
        click.echo(f"{len(versions)} version{'' if len(versions) == 1 else 's'} verified")
