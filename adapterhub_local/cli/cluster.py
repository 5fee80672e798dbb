"""`qhub cluster`: a base on several replicas behind one address, on Ray Serve."""

from pathlib import Path
from typing import Any

import click

from adapterhub_local import settings
from adapterhub_local.cli.output import echo, print_json, print_table, size_text

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(name="cluster")
def command() -> None:
    """Serve a base on several replicas behind one address, on Ray Serve (pip install 'adapterhub-local[ray]').

    \b
    qhub cluster init cluster.toml --base smollm2
    qhub cluster up cluster.toml
    qhub cluster scale 3
    qhub cluster down

    It joins the Ray cluster at RAY_ADDRESS, or starts Ray on this machine.
    """


@command.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--base", metavar="NAME", help="The base to serve. Default: the only one there is.")
def init(path: Path, base: str | None) -> None:
    """Write a cluster.toml with every key to begin with."""
    from adapterhub_local.base.bases import choose_base
    from adapterhub_local.durable import check_absent
    from serve.cluster.tables import described

    name = choose_base(base, settings.home(), "the cluster").name
    check_absent(path).write_text(described().replace("{base}", name), encoding="utf-8")
    echo(f"Wrote {path}: `qhub cluster up {path}` starts it")


@command.command()
@click.argument("path", type=click.Path(path_type=Path))
@AS_JSON
def up(path: Path, as_json: bool) -> None:
    """Start a cluster, or change the running one to what the file says, and wait until it answers."""
    from serve.cluster import control
    from serve.cluster.config import load_config

    _shown(control.up(load_config(path), settings.home(), _note), as_json)


@command.command()
@AS_JSON
def status(as_json: bool) -> None:
    """Show the replicas: where they are, what they do, which adapters they have in memory."""
    from serve.cluster import control

    _shown(control.status(settings.home()), as_json)


@command.command()
@click.argument("replicas", metavar="N | MIN-MAX")
@AS_JSON
def scale(replicas: str, as_json: bool) -> None:
    """Scale to N replicas, or to between MIN and MAX as the load changes. Those that stay are not restarted."""
    from serve.cluster import control

    parts = replicas.split("-")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise click.BadParameter(f"'{replicas}' is not a number of replicas: write 3, or 1-4", param_hint="REPLICAS")
    low, high = int(parts[0]), int(parts[-1])
    _shown(control.scale(settings.home(), low, high, _note), as_json)


@command.command()
@click.argument("replica")
def drain(replica: str) -> None:
    """Replace one replica: it takes no more requests, finishes its answers, and another begins."""
    from serve.cluster import control

    control.drain(settings.home(), replica)
    echo(f"{replica} takes no more requests; it is replaced once its answers have ended")


@command.command()
def down() -> None:
    """End the cluster, and the Ray that was started for it."""
    from serve.cluster import control

    echo("The cluster has ended" if control.down(settings.home()) else "No cluster runs here")


def _note(text: str) -> None:
    echo(text, err=True)


def _shown(state: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(state)
        return
    number = len(state["replicas"])
    urls = ", ".join(state["urls"])
    echo(f"Serving {state['base']} on {number} replica{'' if number == 1 else 's'} at {urls}")
    followed = state["remote"] is not None
    rows = [
        (
            each["replica"],
            each["state"],
            each["node"],
            each["pid"],
            *([each.get("remote")] if followed else []),
            each.get("running"),
            size_text(each["adapter_bytes"]) if "adapter_bytes" in each else None,
            ", ".join(each.get("adapters", ())),
        )
        for each in state["replicas"]
    ]
    remote = ["REMOTE"] if followed else []
    print_table(("REPLICA", "STATE", "NODE", "PID", *remote, "RUNNING", "MEMORY", "ADAPTERS"), rows)
