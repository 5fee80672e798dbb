"""`qhub verify`: the bytes of versions, hashed again."""

import click

from adapterhub_local.cli.output import counting, print_table
from adapterhub_local.errors import Corrupt
from adapterhub_local.registry import Registry


@click.command(name="verify")
@click.argument("references", nargs=-1)
def command(references: tuple[str, ...]) -> None:
    """Hash the files, lineage and manifest of REFERENCES again; of all versions if none is named."""
    from adapterhub_local.registry.fsck import verify

    registry = Registry()
    versions = [registry.resolve(text) for text in references] if references else registry.versions()
    problems = []
    with counting("verifying") as progress:
        for index, version in enumerate(versions):
            problems += [(version, problem.kind, problem.message) for problem in verify(registry, version)]
            progress(index + 1, len(versions))
    if problems:
        print_table(("version", "problem", "what"), problems)
        raise Corrupt(f"{len({str(version) for version, _, _ in problems})} of {len(versions)} versions are not sound")
    click.echo(f"{len(versions)} version{'' if len(versions) == 1 else 's'} verified")
