"""`qhub push`."""

import dataclasses
from typing import Any

import click

from adapterhub_local.cli.output import echo, print_json


@click.command(name="push")
@click.argument("reference", metavar="NAME[@VERSION]|ORG")
@click.argument("repo_id", metavar="[ORG/REPO]", required=False)
@click.option("--all", "everything", is_flag=True, help="Push every version and alias, each name to ORG/NAME.")
@click.option("--alias", "aliases", multiple=True, help="Make this branch point to the version; may be given again.")
@click.option("--pr", "pull_request", is_flag=True, help="Open a pull request instead of committing to main.")
@click.option("--base-id", metavar="ORG/MODEL", help="The Hub id of the base, if it is not known or private.")
@click.option("--license", "licence", metavar="ID", help="Licence for the model card; default: the base's, if known.")
@click.option("--license-name", "licence_name", metavar="NAME", help="What the licence is called, for --license other.")
@click.option("--license-link", "licence_link", metavar="URL", help="Where it can be read, for --license other.")
@click.option("--to-main", is_flag=True, help="Move main to the version although a newer one is there.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    reference: str,
    repo_id: str | None,
    everything: bool,
    aliases: tuple[str, ...],
    pull_request: bool,
    base_id: str | None,
    licence: str | None,
    licence_name: str | None,
    licence_link: str | None,
    to_main: bool,
    private: bool,
    as_json: bool,
) -> None:
    """Push a version to the Hugging Face Hub: one commit, the tag v<number>, a branch for each alias.

    \b
    qhub push sentiment@1 you/sentiment-lora --alias prod
    qhub push sentiment theirs/sentiment-lora --pr
    qhub push --all your-team --private

    The repository is made if it is missing; a version that is there already is not sent again. main moves to newer
    versions only. Of a model card that people edited, our marked block and our keys change, nothing else.
    Needs a token with write access: `hf auth login`, or HF_TOKEN.
    """
    from adapterhub_local.errors import HubError, InputError
    from adapterhub_local.registry import Registry

    if everything:
        if repo_id is not None or aliases or pull_request or to_main:
            raise InputError("--all takes an organisation only: qhub push --all ORG [--private] [--base-id ORG/MODEL]")
        from adapterhub_local.hub import push_all

        done = push_all(
            Registry(), reference, base_id=base_id, private=private, licence=licence, licence_name=licence_name,
            licence_link=licence_link, note=_note,
        )  # fmt: skip
        if as_json:
            print_json([one.to_json() for one in done])
        for one in () if as_json else done:
            echo(f"{one.reference}: {one.error or _told(one.result)}")
        if failed := [one for one in done if one.error]:
            raise HubError(f"{len(failed)} of {len(done)} versions were not pushed; the others are there")
        return
    if repo_id is None:
        raise InputError(f"say where to push {reference}: qhub push {reference} ORG/REPO")
    from adapterhub_local.hub import push

    result = push(
        Registry(), reference, repo_id, base_id=base_id, private=private, aliases=aliases, pull_request=pull_request,
        licence=licence, licence_name=licence_name, licence_link=licence_link, to_main=to_main, note=_note,
    )  # fmt: skip
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        echo(f"{reference} {_told(result)}\n{result.url}")


def _note(text: str) -> None:
    echo(f"note: {text}", err=True)


def _told(result: Any) -> str:
    done = "is there already" if result.unchanged else "pushed"
    where = f"@{result.tag}" if result.tag else f" as pull request {result.pull_request}"
    branches = f", branch {', '.join(result.branches)}" if result.branches else ""
    return f"{done}: {result.repo_id}{where}, commit {result.commit[:12]}{branches}"
