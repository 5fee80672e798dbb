"""Pages that rank and recount: the tasks, the leaderboard of one, and the history of changes."""

from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response

from adapterhub_local.errors import NotFound
from adapterhub_local.registry.catalog import is_lower_better
from adapterhub_local.registry.history import history
from adapterhub_local.registry.listing import Wanted
from adapterhub_local.registry.tasks import tasks_in
from serve.access import Scope, access
from serve.console import views
from serve.console.budget import fitted, part
from serve.console.render import render, shown
from serve.console.texts import LINE, cut
from serve.registry_api.library import Library
from serve.registry_api.reading import Text, key_of

PAGE = 50
MAX_TASKS = 300
MAX_METRICS = 100
MAX_LINK = 500  # letters of a task that an address has


def add_boards(app: FastAPI, library: Library) -> None:
    """Add them."""

    @app.get("/console/tasks", include_in_schema=False)
    @access(Scope.ANY)
    @shown
    def tasks(request: Request) -> Response:
        """What adapters were scored on."""
        found = tasks_in(library.registry, library.visible_names(key_of(request)))
        rows = [
            {**one, "task": cut(one["task"], LINE),
             "link": _link(one["task"]) if len(one["task"]) <= MAX_LINK else None,
             "metrics": [cut(each.replace("_", " "), 40) for each in one["metrics"][:6]]}
            for one in found[:MAX_TASKS]
        ]  # fmt: skip
        return fitted(
            lambda share: render(request, "tasks.html", tasks=rows[: part(MAX_TASKS, share)], total=len(found))
        )

    @app.get("/console/tasks/{task:path}", include_in_schema=False)
    @access(Scope.ANY)
    @shown
    def board(
        task: str,
        request: Request,
        metric: Text = None,
        versions: Annotated[str | None, Query(pattern="^(all|newest)?$")] = None,
        after: Text = None,
        place: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
    ) -> Response:
        """The versions with scores on one task, the best first, each beside its base."""
        key = key_of(request)
        known = next(
            (one for one in tasks_in(library.registry, library.visible_names(key)) if one["task"] == task), None
        )
        if known is None:
            raise NotFound(f"no version here has scores on a task '{task[:80]}'")
        metrics = sorted(known["metrics"], key=lambda one: (one not in views.MAIN, one))
        chosen = metric or metrics[0]
        if chosen not in metrics:
            raise NotFound(
                f"no version here has a score {chosen[:80]} on {task[:80]}: there are {', '.join(metrics[:20])}"
            )
        wanted = Wanted(task=task, sort=chosen, every=versions == "all")
        choices = [one for one in metrics[:MAX_METRICS] if one == chosen or len(one) <= LINE]

        def make(share: float) -> Response:
            found = library.adapters(key, wanted, after=after, limit=part(PAGE, share))
            entries = _with_bases(found.entries, task)
            rows = [_row(entry, task, chosen, place + number) for number, entry in enumerate(entries, 1)]
            asked = {"metric": metric, "versions": versions, "after": found.after, "place": place + len(rows)}
            return render(
                request, "task.html", task=task, metric=chosen, metrics=choices, every=versions == "all",
                total=found.total, rows=rows, is_lower_better=is_lower_better(chosen), link=_link(task),
                has_several=len({row["data"] for row in rows}) > 1,
                next=views.with_query(_link(task), **asked) if found.after else None,
            )  # fmt: skip

        return fitted(make)

    @app.get("/console/history", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def changes(request: Request, name: Text = None, actor: Text = None, after: Text = None) -> Response:
        """What changed, and who changed it, the newest first."""
        found = history(
            library.registry, name=name or None, actor=actor or None, after=after or None, limit=PAGE,
            allowed=library.visible_names(key_of(request)),
        )  # fmt: skip
        rows = [
            {"when": views.time_text(one["at"]), "who": cut(one["actor"] or "unknown", LINE),
             "what": cut(one["what"], 2 * LINE)}
            for one in found.entries
        ]  # fmt: skip
        following = (
            views.with_query("/console/history", name=name, actor=actor, after=found.after) if found.after else None
        )
        return render(request, "history.html", rows=rows, name=name or "", actor=actor or "", next=following)


def _link(task: str) -> str:
    return f"/console/tasks/{quote(task, safe='/')}"


def _with_bases(entries: Sequence[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """The entries, with the base's scores from one beside it that was scored on the same examples of the same base."""

    def data_of(entry: dict[str, Any]) -> tuple[Any, Any] | None:
        data = views.mapping(entry["metrics"].get(task)).get("data")
        return (data, entry["base"]["fingerprint"]) if isinstance(data, str) else None

    known: dict[Any, Any] = {}
    for entry in entries:
        if (place := data_of(entry)) and (base := views.mapping(entry["metrics"].get(task)).get("base")):
            known.setdefault(place, {name: value for name, value in base.items() if name != "difference"})
    made = []
    for entry in entries:
        scores = views.mapping(entry["metrics"].get(task))
        if not scores.get("base") and (base := known.get(data_of(entry))):
            entry = {**entry, "metrics": {**entry["metrics"], task: {**scores, "base": base}}}
        made.append(entry)
    return made


def _row(entry: dict[str, Any], task: str, metric: str, place: int) -> dict[str, Any]:
    """One line of a leaderboard; a version without a score in this metric has no place."""
    scores = views.mapping(entry["metrics"].get(task))
    score = next((row for row in views.score_rows({task: scores}) if row.metric == metric.replace("_", " ")), None)
    difference = views.mapping(views.mapping(views.mapping(scores.get("base")).get("difference")).get(metric))
    return {
        "place": place if score is not None else "",
        "reference": entry["reference"],
        "link": views.version_link(entry["reference"]),
        "score": score,
        "difference": _difference(metric, difference),
        "data": str(scores.get("data") or "")[7:19],
        "base": cut(entry["base"]["name"] or entry["base"]["hub_id"] or "unknown", LINE),
        "rank": entry["rank"] or "",
        "aliases": [alias for alias, number in entry["aliases"].items() if number == entry["version"]][:5],
        "created": views.time_text(entry["created_at"]),
    }


def _difference(metric: str, difference: Any) -> str:
    """`+69.5 points, clear`: what the adapter has more than its base on the same examples."""
    value = views.number(difference.get("value"))
    if value is None:
        return ""
    text = f"{100 * value:+.1f} points" if metric in views.MAIN else f"{value:+.4g}"
    return f"{text}, {'clear' if difference.get('is_clear') else 'not clear'}"
