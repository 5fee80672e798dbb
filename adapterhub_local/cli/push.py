"""`qhub push`."""

import dataclasses

import click

from adapterhub_local.cli.output import print_json


@click.command(name="push")
@click.argument("reference", metavar="NAME[@VERSION]")
@click.argument("repo_id", metavar="ORG/REPO")
@click.option("--base-id", metavar="ORG/MODEL", help="The Hub id of the base, if the version does not know it.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(reference: str, repo_id: str, base_id: str | None, private: bool, as_json: bool) -> None:
    """Push a version to the Hugging Face Hub: one commit, and the tag v<number>.

    The repository is made if it is missing; a version that is there already is not sent again.
    Needs a token with write access: `hf auth login`, or HF_TOKEN.
    """
    from adapterhub_local.hub import push
    from adapterhub_local.registry import Registry

    result = push(Registry(), reference, repo_id, base_id=base_id, private=private)
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        done = "is there already" if result.unchanged else "pushed"
        click.echo(f"{reference} {done}: {result.repo_id}@{result.tag}, commit {result.commit[:12]}\n{result.url}")
