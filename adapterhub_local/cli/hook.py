"""`qhub hook`: who is notified of changes."""

import dataclasses
import shlex
import subprocess
import sys

import click

from adapterhub_local.cli.output import echo, print_json, print_table
from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.registry import Registry
from adapterhub_local.registry.config import DEFAULT_EVENTS, EVENTS, Hook, read_config
from adapterhub_local.settings import environment_in, home


@click.group(name="hook")
def command() -> None:
    """Commands and URLs that are notified of changes: a version, a move of an alias, a removal, an evaluation.

    \b
    qhub hook add deploy --url https://ci.example/adapters --event alias
    qhub hook add notify --command './notify.sh sentiment'
    qhub hook list
    They are kept in config.toml of the home, where they can be written by hand, too. A change never waits for a hook
    and never fails with it; one that fails is tried again after longer and longer waits, 8 times in about two minutes.
    """


@command.command()
@click.argument("name")
@click.option("--url", help="Where to post to.")
@click.option("--command", "line", help="What to run, in the home; it reads the body from its standard input.")
@click.option("--event", "events", multiple=True, type=click.Choice(tuple(EVENTS)),
              help=f"What to be notified of. Default: {', '.join(DEFAULT_EVENTS)}.")  # fmt: skip
@click.option("--name", "names", multiple=True, metavar="PATTERN", help="Only of such names: 'sql*'.")
@click.option("--secret-file", metavar="PATH", help="What signs the body. Default: one is made for a URL.")
@click.option("--unsigned", is_flag=True, help="Do not sign the body.")
@click.option(
    "--timeout", type=float, default=10.0, show_default=True, metavar="SECONDS", help="How long one try may take."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def add(
    name: str, url: str | None, line: str | None, events: tuple[str, ...], names: tuple[str, ...],
    secret_file: str | None, unsigned: bool, timeout: float, as_json: bool,
) -> None:  # fmt: skip
    """Have a URL or a command notified of what changes from now on."""
    from adapterhub_local.registry.config_edit import add_hook

    if unsigned and secret_file:
        raise InputError("--unsigned and --secret-file contradict each other")
    try:
        words = tuple(shlex.split(line)) if line else ()
    except ValueError as error:
        raise InputError(f"--command cannot be read: {error}") from None
    hook = Hook(name, url, words, events or DEFAULT_EVENTS, names, secret_file, timeout)
    hook = add_hook(Registry(), hook, is_signed=not unsigned)
    if as_json:
        print_json(dataclasses.asdict(hook))
        return
    echo(f"{name} is notified of {', '.join(hook.events)}")
    if hook.secret_file is not None:
        echo(
            f"The body is signed as GitHub signs (X-Hub-Signature-256) with the secret in {hook.secret_file}", err=True
        )


@command.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """List the hooks, and how many changes each still has to be notified of."""
    from adapterhub_local.registry.hooks.state import read_log, read_state

    place = home()
    rows = []
    for hook in read_config(place).hooks:
        state, last = read_state(place, hook.name), read_log(place, hook.name, 1)
        waiting, failed = (len(state.waiting), len(state.failed)) if state is not None else (0, 0)
        rows.append((hook, waiting, failed, last[0] if last else None))
    if as_json:
        print_json([{**dataclasses.asdict(hook), "waiting": waiting, "failed": failed, "last": last}
                    for hook, waiting, failed, last in rows])  # fmt: skip
        return
    if not rows:
        echo("No hooks yet. Add one: qhub hook add NAME --url URL, or --command LINE")
        return
    shown = [
        (hook.name, hook.url or shlex.join(hook.command), ", ".join(hook.events), waiting, failed,
         f"{last['state']} {last['at'][:19].replace('T', ' ')}" if last else None)
        for hook, waiting, failed, last in rows
    ]  # fmt: skip
    print_table(("name", "notifies", "of", "waiting", "given up", "last try"), shown)


@command.command()
@click.argument("name")
def rm(name: str) -> None:
    """Remove a hook; changes that it was not notified of yet are dropped."""
    from adapterhub_local.registry.config_edit import remove_hook

    remove_hook(Registry(), name)
    echo(f"removed {name}")


@command.command()
@click.argument("name")
@click.option("--limit", type=click.IntRange(1, 10000), default=20, show_default=True, help="How many tries.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def log(name: str, limit: int, as_json: bool) -> None:
    """Show the last attempts to notify a hook, newest first."""
    from adapterhub_local.registry.config_edit import find_hook
    from adapterhub_local.registry.hooks.state import read_log

    place = home()
    find_hook(read_config(place), name)
    entries = read_log(place, name, limit)
    if as_json:
        print_json(entries)
        return
    rows = [
        (entry["at"][:19].replace("T", " "), entry["change"], entry["attempt"], entry["state"], f"{entry['ms']} ms",
         entry["said"])
        for entry in entries
    ]  # fmt: skip
    print_table(("when", "change", "attempt", "state", "took", "reply"), rows)


@command.command()
@click.argument("name", required=False)
@click.option("--failed", is_flag=True, help="Also retry what was given up.")
@click.option("--quiet", is_flag=True, help="Print nothing, as when a change starts it by itself.")
def deliver(name: str | None, failed: bool, quiet: bool) -> None:
    """Send hooks, or hook NAME, the changes they have not had yet, and wait until each is delivered or given up."""
    from adapterhub_local.registry.config_edit import find_hook
    from adapterhub_local.registry.hooks.deliver import deliver as deliver_to

    registry = Registry()
    config = read_config(registry.home)
    hooks = config.hooks if name is None else (find_hook(config, name),)
    if len(hooks) > 1:  # a slow one is not to hold up the others
        words = [sys.executable, "-m", "adapterhub_local", "hook", "deliver"]
        words += (["--failed"] if failed else []) + (["--quiet"] if quiet else [])
        processes = [subprocess.Popen([*words, hook.name], env=environment_in(registry.home)) for hook in hooks]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise QhubError("not every hook accepted everything: `qhub hook list` shows which")
        return
    for hook in hooks:
        left = deliver_to(registry, hook, retry_failed=failed)
        if left is None:
            if not quiet:
                echo(f"{hook.name}: another process is notifying it already")
            continue
        if left.waiting:
            raise QhubError(f"{hook.name}: its command is run by the owner of config.toml only, when nobody else may "
                            f"write that file: {len(left.waiting)} changes wait")  # fmt: skip
        if left.failed:
            error = next(iter(left.failed.values())).error
            raise QhubError(
                f"{hook.name}: {len(left.failed)} changes were given up ({error}): "
                "`qhub hook deliver --failed` tries again"
            )
        if not quiet:
            echo(f"{hook.name} has been notified of everything")
