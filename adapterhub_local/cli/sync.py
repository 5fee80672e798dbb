"""`qhub sync`: versions to and from a remote, with the aliases and splits that the remote records for them."""

from collections.abc import Sequence
from dataclasses import asdict

import click

from adapterhub_local.cli.output import counting, echo, print_json, print_table, size_text
from adapterhub_local.errors import InputError, InUse
from adapterhub_local.keys import Keys
from adapterhub_local.refs import Reference, check_alias
from adapterhub_local.registry import Registry
from adapterhub_local.registry.moved import Moved
from adapterhub_local.registry.remote_log import Log, open_log
from adapterhub_local.registry.remote_marks import Taken, take_keys, take_marks
from adapterhub_local.registry.remote_moves import Logged, aliases_at, move_alias, set_split
from adapterhub_local.registry.remotes import find_remote
from adapterhub_local.registry.rows import NOTHING
from adapterhub_local.registry.split import parse_split
from adapterhub_local.registry.store import open_store


@click.group(name="sync")
def command() -> None:
    """Send versions to a remote or fetch them from it, with what they were merged from."""


@command.command()
@click.argument("remote")
@click.argument("references", metavar="NAME[@V]...", nargs=-1, required=True)
@click.option("--all", "every", is_flag=True, help="All versions of NAME, not only the newest.")
@click.option("--recheck", is_flag=True, help="Also read back what was there already, and resend what is damaged.")
@click.option("--alias", metavar="ALIAS", help="Point NAME@ALIAS of the remote to what was sent.")
@click.option("--expect", type=int, metavar="N", help="Only if the alias points to version N of the remote, or to none "
              "(0), now.")  # fmt: skip
@click.option("--split", "shares", metavar="ALIAS=SHARE,...", help="Split the traffic of plain NAME between aliases of "
              "the remote, such as canary=10,prod=90, or 'off'.")  # fmt: skip
@click.option("--drop-alias", metavar="ALIAS", help="Remove NAME@ALIAS from the remote.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent, and send nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def push(
    remote: str,
    references: tuple[str, ...],
    every: bool,
    recheck: bool,
    alias: str | None,
    expect: int | None,
    shares: str | None,
    drop_alias: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Send versions to REMOTE; what is there is not sent again, and what was sent is read back and hashed.

    A number that belongs to another version there is not touched: the version gets the next one. Tags and later
    evaluations go along.

    \b
    qhub sync push team sentiment --alias prod              every server that follows it answers with it soon
    qhub sync push team sentiment@4 --alias prod --expect 3
    qhub sync push team sentiment --split canary=10,prod=90

    Aliases of the remote are its own: those of this home are not sent, and not changed.
    """
    from adapterhub_local.registry.push import push as push_versions

    if expect is not None and (len(references) > 1 or (alias is None) == (drop_alias is None)):
        raise InputError("--expect is about one alias of one NAME: give one of each, with --alias or --drop-alias")
    if dry_run and (alias or shares or drop_alias):
        raise InputError("--dry-run sends nothing, and moves nothing: leave out --alias, --drop-alias and --split")
    if alias is not None:
        check_alias(alias)
    split = None if shares is None else [] if shares == "off" else parse_split(shares)
    registry = Registry()
    found = find_remote(registry.home, remote)
    versions = [registry.resolve(text) for text in references]
    names = list(dict.fromkeys(version.name for version in versions))
    if alias is not None and (every or len(names) < len(versions)):
        raise InputError("--alias points to one version of a name: give each NAME[@V] once, without --all")
    if every:
        _check_names(references)
        versions = [one for version in versions for one in registry.versions(version.name)]
    with counting("pushing", in_bytes=True) as progress:
        moved = push_versions(
            registry, open_store(found), versions, dry_run=dry_run, recheck=recheck, progress=progress
        )
    log, changes = Log(open_store(found)), []
    sent = {one.source: Reference.parse(one.target).version for one in moved}
    if alias is not None:
        changes += [move_alias(log, one.name, alias, sent[str(one)], expect=expect) for one in versions]
    if split is not None:
        changes += [set_split(log, name, split) for name in names]
    if drop_alias is not None:
        changes += [move_alias(log, name, drop_alias, None, expect=expect) for name in names]
    _print(found.name, moved, "sent", f"{found.name} ", dry_run, as_json, changes)


@command.command()
@click.argument("remote")
@click.argument("reference", metavar="NAME[@V]")
@click.option("--all", "every", is_flag=True, help="All versions of NAME, not only the newest.")
@click.option("--no-aliases", is_flag=True, help="Leave aliases, splits and tags of this home as they are.")
@click.option("--expect", type=int, metavar="N", help="With NAME@ALIAS: only if it points to version N, or to "
              "none (0), here now.")  # fmt: skip
@click.option("--keys", is_flag=True, help="Take in the API keys that were published there, too, as hashes.")
@click.option("--dry-run", is_flag=True, help="Print what would be fetched, and fetch nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull(
    remote: str,
    reference: str,
    every: bool,
    no_aliases: bool,
    expect: int | None,
    keys: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Register a version of REMOTE here, after checking every byte; the newest if no number is given.

    It keeps its number if that was never used here, else it gets the next one. The same command again goes
    on where it was interrupted.

    Without a number, what the remote's aliases of NAME point to comes along. Aliases, split, tags and evaluations that
    the remote has a record of become what it says; what it has no record of stays. Each change is printed, and
    `qhub alias rollback` takes an alias back.
    """
    from adapterhub_local.registry.pull import pull as pull_versions

    registry = Registry()
    wanted = Reference.parse(reference)
    found = find_remote(registry.home, remote)
    if every:
        _check_names((reference,))
    if expect is not None:
        if wanted.alias is None or no_aliases:
            raise InputError(f"--expect is about an alias here: write {wanted.name}@ALIAS, without --no-aliases")
        if (at := registry.aliases(wanted.name).get(wanted.alias, NOTHING)) != expect:
            raise InUse(f"{wanted} points to {at or 'nothing'} here, not to {expect or 'nothing'}: nothing was changed")
    store = open_store(found)
    log = open_log(store)
    asked = [wanted]
    if wanted == Reference(wanted.name) and not every and not no_aliases:
        numbers = {record.fields["number"] for record in aliases_at(log, wanted.name)}
        asked += [Reference(wanted.name, version=number) for number in sorted(numbers)]
    moved: list[Moved] = []
    with counting("pulling", in_bytes=True) as progress:
        for one in asked:
            came = pull_versions(registry, store, one, every=every, dry_run=dry_run, progress=progress)
            known = {each.manifest_digest for each in moved}
            moved += [each for each in came if each.manifest_digest not in known]
    taken = [] if no_aliases or dry_run else take_marks(registry, log, wanted.name)
    if keys and not dry_run:
        taken += take_keys(Keys(registry.home), log)
    _print(found.name, moved, "fetched", "", dry_run, as_json, taken)


@command.command()
@click.argument("remote")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(remote: str, name: str | None, as_json: bool) -> None:
    """Show what REMOTE has, of NAME or of all names: newest version, aliases, split; and what is here."""
    from adapterhub_local.registry.remote_status import status as status_of

    registry = Registry()
    found = status_of(registry, open_log(open_store(find_remote(registry.home, remote))), name)
    if as_json:
        print_json(found)
        return
    rows = [
        (entry["reference"], entry["there"], entry["here"], entry["state"], entry["by"], (entry["at"] or "")[:19])
        for entry in found["entries"]
    ]
    print_table(("what", "at the remote", "here", "state", "by", "when"), rows)
    echo(f"{found['records']} record{'' if found['records'] == 1 else 's'}, {found['keys']} valid "
         f"key{'' if found['keys'] == 1 else 's'}")  # fmt: skip
    for number, reason in found["unread"].items():
        echo(f"record @{number} means nothing to this qhub: {reason}", err=True)


@command.command(name="log")
@click.argument("remote")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def log_(remote: str, name: str | None, as_json: bool) -> None:
    """Show all records of REMOTE, or those about NAME, oldest first: who moved what, and when."""
    from adapterhub_local.registry.remote_status import described, records

    log = Log(open_store(find_remote(Registry().home, remote)))
    found = records(log, name)
    if as_json:
        # of a key all but what is made of its secret
        print_json([one.to_json() | ({"key": None} if one.kind == "key" else {}) for one in found])
    else:
        rows = [(one.number, one.at[:19].replace("T", " "), one.by, one.kind, *described(one)) for one in found]
        print_table(("record", "when", "by", "kind", "about", "what"), rows)
    for number, reason in log.unread.items():
        echo(f"record @{number} means nothing to this qhub: {reason}", err=True)


def _check_names(references: tuple[str, ...]) -> None:
    for text in references:
        if "@" in text:
            raise InputError(f"--all takes a name, '{text}' is one version: leave out '@...' or --all")


def _print(
    remote: str,
    moved: Sequence[Moved],
    done: str,
    place: str,
    dry_run: bool,
    as_json: bool,
    changes: Sequence[Logged | Taken],
) -> None:
    if as_json:
        shown = [asdict(one) for one in changes]
        print_json({"remote": remote, "dry_run": dry_run, "versions": [asdict(one) for one in moved], "changes": shown})
        return
    would = "would be " if dry_run else ""
    for one in moved:
        as_what = f" as {place}{one.target}" if one.target != one.source else ""
        if not one.is_new:
            echo(f"{one.source} was there already{as_what}" + (f", {one.num_objects} objects resent"
                       if one.num_objects else ""))  # fmt: skip
        else:
            size = f"{one.num_objects} object{'' if one.num_objects == 1 else 's'}, {size_text(one.num_bytes)}"
            echo(f"{one.source} {would}{done}{as_what} ({size})")
    for change in changes:
        echo(_sentence(change, remote), err=isinstance(change, Taken) and change.reason is not None)


def _sentence(change: Logged | Taken, remote: str) -> str:
    before, now = (_value(value) for value in (change.before, change.now))
    if isinstance(change, Logged):
        return f"{remote} {change.subject}: " + (f"{before} -> {now}" if change.is_new else f"{now} already")
    if change.reason is not None:
        return f"{change.kind} {change.subject} stays {before}: {change.reason}"
    return f"{change.kind} {change.subject}: {before} -> {now}, by {change.by} at {change.at[:19]}"


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{alias}={share}" for alias, share in value.items()) or "not split"
    return "nothing" if value is None else str(value)
