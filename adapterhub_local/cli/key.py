"""`qhub key`: who may ask the server, for what, and how often."""

from typing import TYPE_CHECKING

import click

from adapterhub_local import settings
from adapterhub_local.cli.output import echo, print_json, print_table
from adapterhub_local.errors import InputError, NotFound
from adapterhub_local.keys import PRIORITIES, SCOPES, Key, Keys
from adapterhub_local.registry import Registry
from adapterhub_local.registry.key_log import create_key, revoke_key

if TYPE_CHECKING:
    from adapterhub_local.registry.remote_log import Log


@click.group(name="key")
def command() -> None:
    """API keys of the server. As soon as there is one, every request needs one.

    \b
    qhub key create --adapters 'sql*' --rate 60/min
    qhub key create --scope admin
    qhub key list
    qhub key publish team 3f9c21aa
    qhub key revoke 3f9c21aa --remote team
    """


@command.command()
@click.option("--scope", "scopes", multiple=True, type=click.Choice(SCOPES), help="What it is for. Default: infer.")
@click.option("--adapters", multiple=True, metavar="PATTERN", help="Names it may ask, such as 'sql*'. Default: all.")
@click.option("--rate", metavar="N/PERIOD", help="Requests in any second, minute, hour or day: 60/min.")
@click.option("--concurrency", type=int, metavar="N", help="Requests at once.")
@click.option(
    "--priority",
    type=click.Choice(PRIORITIES),
    default="normal",
    show_default=True,
    help="Whose requests go first when some have to wait.",
)
@click.option("--expires", metavar="AGE", help="When it expires: 12h, 30d.")
@click.option("--note", help="What it is for, in words.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def create(
    scopes: tuple[str, ...],
    adapters: tuple[str, ...],
    rate: str | None,
    concurrency: int | None,
    priority: str,
    expires: str | None,
    note: str | None,
    as_json: bool,
) -> None:
    """Make a key and print it: it is stored as a hash only, and cannot be shown again."""
    key, token = create_key(
        Registry(),
        scopes=scopes or ("infer",),
        adapters=adapters,
        rate=rate,
        concurrency=concurrency,
        priority=priority,
        expires=expires,
        note=note,
    )
    if as_json:
        print_json({**key.to_json(), "key": token})
    else:
        echo(token)
        echo("Keep it: it cannot be shown again. Clients send it as their API key.", err=True)


@command.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """List the keys, revoked ones included."""
    keys = Keys(settings.home()).all()
    if as_json:
        print_json([key.to_json() for key in keys])
        return
    rows = [
        (
            key.id,
            ", ".join(key.scopes),
            ", ".join(key.adapters) or "all",
            key.rate,
            key.concurrency,
            key.priority,
            _state(key),
            key.note,
        )
        for key in keys
    ]
    print_table(("id", "scopes", "adapters", "rate", "at once", "priority", "state", "note"), rows)


@command.command()
@click.argument("remote")
@click.argument("identities", metavar="ID...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def publish(remote: str, identities: tuple[str, ...], as_json: bool) -> None:
    """Let servers that follow REMOTE accept these keys, too: their hashes and limits are sent, never the keys.

    Whoever may write at REMOTE can let keys in there, so it should be written by those alone who may.
    """
    from adapterhub_local.registry.remote_moves import publish_key

    known = {key.id: key for key in Keys(settings.home()).all()}
    chosen = [_id(identity) for identity in identities]
    if missing := [identity for identity in chosen if identity not in known]:
        raise NotFound(f"there is no key '{missing[0]}': `qhub key list` shows all keys")
    if invalid := [identity for identity in chosen if not known[identity].is_valid()]:
        raise InputError(f"key {invalid[0]} is revoked or expired: nothing was published")
    log = _log(remote)
    marked = [publish_key(log, known[identity]) for identity in chosen]
    if as_json:
        print_json([{"id": one.subject, "remote": remote, "is_new": one.is_new} for one in marked])
    for one in marked if not as_json else ():
        echo(f"{remote} has {one.subject}" + ("" if one.is_new else " already"))


@command.command()
@click.argument("identity", metavar="ID")
@click.option("--remote", metavar="REMOTE", help="Where it was published: all servers that follow it refuse the key.")
def revoke(identity: str, remote: str | None) -> None:
    """Refuse a key from now on, also where a server runs."""
    from adapterhub_local.registry.remotes import list_remotes

    keys = Keys(settings.home())
    if remote is not None:
        from adapterhub_local.registry.remote_moves import revoke_key as revoke_at

        record = revoke_at(_log(remote), _id(identity))
        echo(f"revoked {record.subject} at {remote}" + ("" if record.is_new else ", where it was revoked already"))
        if all(key.id != record.subject for key in keys.all()):
            return  # made in another home
    key = revoke_key(Registry(), _id(identity))
    echo(f"revoked {key.id}")
    if remote is None and (known := [one.name for one in list_remotes(settings.home())]):
        echo(f"If it was published at {' or '.join(known)}, it is still accepted there: add --remote", err=True)
    if not any(other.is_valid() for other in keys.all()):  # it does not open again: nobody asked for that
        echo("No valid key is left: the server refuses every request until `qhub key create`.", err=True)


def _id(text: str) -> str:
    """The id in a key, or the id itself."""
    return text.removeprefix("qhub-").partition("-")[0]


def _log(remote: str) -> "Log":
    from adapterhub_local.registry.remote_log import Log
    from adapterhub_local.registry.remotes import find_remote
    from adapterhub_local.registry.store import open_store

    return Log(open_store(find_remote(settings.home(), remote)))


def _state(key: Key) -> str:
    if key.revoked_at:
        return f"revoked {key.revoked_at[:10]}"
    if not key.is_valid():
        return "expired"
    return f"until {key.expires_at[:10]}" if key.expires_at else "valid"
