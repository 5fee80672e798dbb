"""The error of a merge against the rank that is kept: a curve, and the same as a table."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from adapterhub_local.counts import thinned
from adapterhub_local.draw.curve import HELD_OUT, TRAIN, Curve, Panel, inline_svg
from serve.console import views
from serve.console.budget import part

ROWS = 40  # of the table
LABEL = "relative error, as a share of the norm"


def by_rank(report: Mapping[str, Any], share: float) -> dict[str, Any] | None:
    """The curve of a preview's report, None where it has none; of high ranks only some are drawn and listed."""
    given = report.get("error_by_rank")
    errors = [views.number(one) for one in given] if isinstance(given, list) else []
    if not errors or None in errors:
        return None
    values = [float(one) for one in errors if one is not None]
    last, chosen = len(values), report.get("rank")
    count = min(last, part(views.MAX_POINTS, share))
    ranks = sorted({1 + round(index * (last - 1) / max(1, count - 1)) for index in range(count)} | {last})
    mine = chosen if isinstance(chosen, int) and 1 <= chosen <= last else None
    curves = [Curve([(rank, values[rank - 1]) for rank in ranks], TRAIN, "best possible" if mine else "", 2.5)]
    if mine is not None:
        curves.append(Curve([(mine, values[mine - 1])], HELD_OUT, f"rank {mine}", 9))
    title = f"Error against rank: {_percent(values[0])} at rank 1, {_percent(values[-1])} at rank {last}"
    if mine is not None:
        title += f"; {_percent(values[mine - 1])} at rank {mine}, as asked"
    rows = sorted({*thinned(last, _growth(last, part(ROWS, share))), *([mine] if mine else [])})
    dtype, rounding = report.get("dtype"), views.number(report.get("rounding_error")) or 0.0
    return {
        "picture": Markup(inline_svg([Panel(LABEL, tuple(curves), "rank")], title)),  # noqa: S704 - it escapes
        "rows": [
            {"rank": rank, "error": _percent(values[rank - 1]), "energy": _percent(1 - values[rank - 1] ** 2),
             "is_mine": rank == mine} for rank in rows
        ],
        "is_thinned": len(rows) < last,
        "rounding": f"Storing it in {dtype} adds up to {_percent(rounding)}." if rounding >= 1e-4 else "",
    }  # fmt: skip


def _growth(last: int, most: int) -> float:
    """By how much rows grow so that there are at most as many."""
    growth = 1.0
    while len(thinned(last, growth)) > most:
        growth *= 1.1
    return growth


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %" if value >= 1e-4 or value == 0 else f"{100 * value:.1e} %"
