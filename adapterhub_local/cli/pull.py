"""`qhub pull`: from the Hugging Face Hub, or from an OCI registry."""

import click

from adapterhub_local.cli.output import counting, echo, note_taken_in, print_json


@click.command(name="pull")
@click.argument("repository", metavar="ORG/REPO[/FOLDER][@REVISION]|oci://...")
@click.option("--subfolder", metavar="FOLDER", help="The folder of the repository that the adapter is in.")
@click.option("--name", metavar="NAME", help="The adapter's name here; default: the repository's own.")
@click.option("--base", metavar="BASE", help="The base here it is for, where neither fingerprint nor Hub id decides.")
@click.option("--force", is_flag=True, help="Put it on --base although it was made for another; it is recorded.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    repository: str, subfolder: str | None, name: str | None, base: str | None, force: bool, as_json: bool
) -> None:
    """Pull an adapter from the Hugging Face Hub or from an OCI registry, and register it as a version.

    \b
    qhub pull you/sentiment-lora@v1
    qhub pull oci://ghcr.io/you/sentiment:v1

    From an OCI registry (oci://, what serves container images) comes what `qhub push` sent there, with the versions it
    was made of; the name is followed by a tag, or by @sha256:... for exactly this version. All options but --json
    are for the Hub.

    REVISION is a tag, a branch or a commit; the URL of a repository's page works too. What `qhub push` made is
    checked byte for byte and comes back as it was; what PEFT made is rewritten. Pickles and unsupported features are
    refused. The base is known by its fingerprint, or by Hub id and revision; shapes that fit are only a hint, which
    --base confirms; against another fingerprint it needs --force, as in `qhub add`.
    """
    if repository.startswith("oci://"):
        if subfolder or name or base or force:
            raise click.UsageError(
                "what comes from an OCI registry keeps its name and its base: "
                "--subfolder, --name, --base and --force are for the Hub"
            )
        _from_registry(repository, as_json)
        return
    from adapterhub_local.hub import pull
    from adapterhub_local.registry import Registry

    if force and base is None:
        raise click.UsageError("--force puts an adapter on the base that --base names: name one")
    result = pull(Registry(), repository, subfolder=subfolder, name=name, base=base, force=force)
    version, hub_id = result.version, result.version.lineage.get("base", {}).get("hub_id")
    if as_json:
        print_json(
            {
                "name": version.name,
                "version": version.number,
                "repo_id": result.repo_id,
                "commit": result.commit,
                "is_new": result.is_new,
                "is_verified": result.is_verified,
                "base": result.base,
                "base_matched_by": result.matched_by,
                "bases_that_fit": list(result.fitting),
                "base_hub_id": hub_id,
                "content_digest": version.content_digest,
                "manifest_digest": version.manifest_digest,
            }
        )
        return
    done = "pulled" if result.is_new else "here already"
    checked = "its bytes match its manifest" if result.is_verified else "made with PEFT, no manifest to check against"
    echo(f"{version} {done}: {result.repo_id} at {result.commit[:12]}, {checked}")
    note_taken_in(version)
    if result.base_known:
        echo(f"its base is {result.base}, by {result.matched_by}")
        return
    fits = ", ".join(result.fitting)
    hint = f", or if it is {fits}, whose shapes fit, confirm with --base {result.fitting[0]}" if fits else ""
    echo(
        f"note: its base {hub_id or '(not named)'} is not among the bases here: "
        f"add it with `qhub base add NAME {hub_id or 'SOURCE'}`{hint}",
        err=True,
    )


def _from_registry(text: str, as_json: bool) -> None:
    from adapterhub_local.oci.address import Address
    from adapterhub_local.oci.transfer import pull
    from adapterhub_local.registry import Registry

    address = Address.parse(text)
    with counting(f"pulling {address}", in_bytes=True) as progress:
        received = pull(Registry(), address, progress)
    if as_json:
        print_json([
            {"reference": str(one.version), "was": one.reference, "is_new": one.is_new,
             "manifest_digest": one.version.manifest_digest, "content_digest": one.version.content_digest}
            for one in received
        ])  # fmt: skip
        return
    for one in received:
        was = f" (there {one.reference})" if one.reference != str(one.version) else ""
        echo(f"{one.version}{was} {'pulled' if one.is_new else 'here already'}: {one.version.manifest_digest}")
