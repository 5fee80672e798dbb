"""`qhub runs`: what was trained, how it went, and what can be resumed."""

from pathlib import Path
from typing import Any

import click

from adapterhub_local.cli.output import echo, print_json, print_table
from adapterhub_local.client import Server, check_here, chosen_server
from adapterhub_local.errors import NotFound
from adapterhub_local.settings import home


@click.group(name="runs")
def command() -> None:
    """List, show and remove training runs."""


@command.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(as_json: bool) -> None:
    """List all runs, the oldest first."""
    if (server := chosen_server()) is not None:
        runs = list(server.pages("/runs"))[::-1]
    else:
        from adapterhub_local.train.past_runs import list_runs

        runs = [run.to_json() for run in list_runs(home())]
    if as_json:
        print_json(runs)
        return
    if not runs:
        echo("No runs yet. Train an adapter: qhub train recipe.toml")
        return
    print_table(("run", "status", "step", "loss", "held-out loss", "version", "started"), [_row(run) for run in runs])


def _row(run: dict[str, Any]) -> tuple[Any, ...]:
    status = f"{run['status']}, can be resumed" if run["can_resume"] else run["status"]
    started = (run["started_at"] or "")[:16].replace("T", " ")
    losses = [None if run[key] is None else f"{run[key]:.4f}" for key in ("loss", "eval_loss")]
    return (run["id"], status, f"{run['step']}/{run['steps'] or '?'}", *losses, run["version"], started)


@command.command(name="show")
@click.argument("run")
@click.option("--log", "with_log", is_flag=True, help="With every line of the log, as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the curves to a .svg or .png file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(run: str, with_log: bool, plot: Path | None, as_json: bool) -> None:
    """Show RUN: an id, its beginning, or an adapter's name for its newest run."""
    from adapterhub_local.draw.curve import write_picture
    from adapterhub_local.train.log_curves import panels, terminal_plot

    if (server := chosen_server()) is not None:
        fields, entries = _there(server, run)
    else:
        from adapterhub_local.train.past_runs import find_run, read_log

        found = find_run(home(), run)
        fields, entries = found.to_json(), read_log(found.folder)
    if plot is not None:
        write_picture(panels(entries), str(fields["version"] or fields["id"]), plot)
    if as_json or with_log:
        print_json({**fields, "log": entries} if with_log else fields)
        return
    for key, value in fields.items():
        if value is not None:
            echo(f"{key:12} {f'{value:.4f}' if isinstance(value, float) else value}")
    echo()
    echo(terminal_plot(entries))


def _there(server: Server, wanted: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run at a server, found as one here is, and its whole log."""
    runs = list(server.pages("/runs"))  # the newest first
    fits = (run for run in runs if wanted and (run["id"].startswith(wanted) or run["name"] == wanted))
    chosen = next((run for run in runs if run["id"] == wanted), None) or next(fits, None)
    if chosen is None:
        raise NotFound(f"there is no run '{wanted}': `qhub runs list` shows them")
    entries: list[dict[str, Any]] = []
    place = 0
    while True:
        part = server.get(f"/runs/{chosen['id']}", offset=place)
        entries += part["log"]
        if part["next"] == place:
            return {key: part[key] for key in part if key not in ("log", "next")}, entries
        place = part["next"]


@command.command(name="rm")
@click.argument("runs", nargs=-1, required=True)
def remove(runs: tuple[str, ...]) -> None:
    """Remove RUNS with their checkpoints and reports; versions they made stay."""
    check_here("runs rm")
    from adapterhub_local.train.past_runs import find_run, remove_run

    found = [find_run(home(), run) for run in runs]
    for run in found:
        remove_run(run)
        echo(f"removed {run.id}")
