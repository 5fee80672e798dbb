"""`qhub push`: to the Hugging Face Hub, or to an OCI registry."""

import dataclasses
from typing import Any

import click

from adapterhub_local.cli.output import counting, echo, print_json, size_text


@click.command(name="push")
@click.argument("reference", metavar="NAME[@VERSION]|ORG")
@click.argument("repo_id", metavar="[ORG/REPO|oci://...]", required=False)
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
    """Push a version to the Hugging Face Hub or to an OCI registry.

    \b
    qhub push sentiment@1 you/sentiment-lora --alias prod
    qhub push sentiment theirs/sentiment-lora --pr
    qhub push --all your-team --private
    qhub push sentiment@1 oci://ghcr.io/you/sentiment:v1

    An OCI registry (oci://, what serves container images: GHCR, Docker Hub, Harbor) gets the version and the versions
    it was made of, with the credentials of `docker login` or `oras login`. Digests are the same there. All options
    but --json are for the Hub.

    On the Hub a version is one commit with the tag v<number>, and a branch for each alias. The repository is made if
    it is missing; a version that is there already is not sent again. main moves to newer versions only. Of a model card
    that people edited, our marked block and our keys change, nothing else.
    Needs a token with write access: `hf auth login`, or HF_TOKEN.
    """
    from adapterhub_local.errors import HubError, InputError
    from adapterhub_local.registry import Registry

    if repo_id is not None and repo_id.startswith("oci://"):
        of_the_hub = (everything, aliases, pull_request, to_main, private, base_id, licence, licence_name, licence_link)
        if any(of_the_hub):
            raise InputError(
                "an OCI registry takes a version and an address, no options of the Hub: qhub push NAME oci://HOST/TEAM/NAME:TAG"
            )
        _to_registry(reference, repo_id, as_json)
        return
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
            echo(f"{one.reference}: {one.error or _outcome(one.result)}")
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
        echo(f"{reference} {_outcome(result)}\n{result.url}")


def _to_registry(reference: str, text: str, as_json: bool) -> None:
    from adapterhub_local.oci.address import Address
    from adapterhub_local.oci.transfer import push
    from adapterhub_local.registry import Registry

    address, registry = Address.parse(text), Registry()
    with counting(f"pushing {reference}", in_bytes=True) as progress:
        done = push(registry, registry.resolve(reference), address, progress)
    if as_json:
        print_json(done.to_json())
        return
    moved = f", the tag was at {done.moved_from[:19]}" if done.moved_from else ""
    echo(f"{done.version} -> {done.address}: {size_text(done.num_bytes)} sent{moved}\n{done.version.manifest_digest}")


def _note(text: str) -> None:
    echo(f"note: {text}", err=True)


def _outcome(result: Any) -> str:
    done = "is there already" if result.unchanged else "pushed"
    where = f"@{result.tag}" if result.tag else f" as pull request {result.pull_request}"
    branches = f", branch {', '.join(result.branches)}" if result.branches else ""
    return f"{done}: {result.repo_id}{where}, commit {result.commit[:12]}{branches}"
