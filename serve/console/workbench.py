"""The pages where adapters are tried: the playground, and the merge workbench. A link to them runs nothing."""

from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response

from adapterhub_local.errors import NotFound
from adapterhub_local.registry.listing import Wanted
from serve.access import Scope, access
from serve.console import views
from serve.console.render import render, shown
from serve.registry_api.library import Library
from serve.registry_api.reading import Text, key_of

Texts = Annotated[list[str] | None, Query(max_length=8)]
Long = Annotated[str | None, Query(max_length=20_000)]
MAX_COLUMNS = 6
MAX_TOKENS = 4096  # of an answer
MAX_CHOICES = 200  # names that are offered
METHODS = (
    "weighted_sum",
    "weighted_average",
    "slerp",
    "ties",
    "dare_linear",
    "dare_ties",
)  # those without a choice to make


def add_workbench(app: FastAPI, library: Library) -> None:
    """Add them."""

    @app.get("/console/play", include_in_schema=False)
    @access(Scope.INFER)
    @shown
    def play(
        request: Request,
        m: Texts = None,
        prompt: Long = None,
        system: Long = None,
        form: Text = None,
        temperature: Text = None,
        tokens: Text = None,
        probabilities: Text = None,
        blind: Text = None,
    ) -> Response:
        """Answers of several models to the same prompt, side by side; all that is set is in the address."""
        base = request.app.state.base_name
        if base is None:
            raise NotFound("there is no model here: `qhub serve` has the playground beside the API")
        offered = _choices(library, request)
        columns = [one for one in m or [] if one][:MAX_COLUMNS] or [base, *offered[:1]]
        return render(
            request, "play.html", columns=columns, prompt=prompt or "", system=system or "", choices=[base, *offered],
            form="text" if form == "text" else "chat", temperature=_within(temperature, 0.0, 2.0, 0.0),
            tokens=_within(tokens, 1, MAX_TOKENS, 128), max_tokens=MAX_TOKENS,
            has_probabilities=probabilities == "1", is_blind=blind == "1",
        )  # fmt: skip

    @app.get("/console/merge", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def merge(
        request: Request, m: Texts = None, w: Texts = None, rank: Text = None, method: Text = None, job: Text = None
    ) -> Response:
        """What a merge would lose, before it is made."""
        body: dict[str, Any] | None = library.jobs.find(job).to_json() if job else None
        if body is not None and body["kind"] != "preview":
            raise NotFound("that job is about something else")
        rows = [{"reference": name, "weight": weight} for name, weight in zip(m or [], w or [], strict=False)]
        rows += [{"reference": "", "weight": "1"}] * (2 - len(rows))
        report = views.mapping(body["result"]) if body else {}
        return render(
            request, "merge.html", rows=rows, rank=rank or "", method=method or METHODS[0], methods=METHODS,
            choices=_choices(library, request), job=body, report=_report(report) if report else None,
            heat=views.cosines(report.get("modules", []), "Cosines of the two by module and layer")
            if len(rows) == 2 else None,
        )  # fmt: skip


def _within(text: str | None, low: float, high: float, default: float) -> str:
    """The number of an address, the default for what is none or is out of bounds."""
    try:
        value = type(low)(text or default)
    except ValueError:
        value = default
    return f"{value if low <= value <= high else default:g}"


def _choices(library: Library, request: Request) -> list[str]:
    """The newest versions of adapters, for a field to offer."""
    found = library.adapters(key_of(request), Wanted(sort="created"), limit=MAX_CHOICES)
    base = request.app.state.base_fingerprint
    return [entry["reference"] for entry in found.entries if base in (None, entry["base"]["fingerprint"])]


def _report(report: Any) -> dict[str, Any]:
    figures = {name: views.number(report.get(name)) for name in ("relative_error", "retained_energy", "kept")}
    shown_as = {name: "" if value is None else f"{100 * value:.2f} %" for name, value in figures.items()}
    modules = [one for one in report.get("modules", []) if views.number(one.get("relative_error")) is not None]
    worst = sorted(modules, key=lambda one: -float(one["relative_error"]))[:8]
    return {
        **shown_as,
        "rank": report.get("rank"),
        "exact_rank": report.get("exact_rank"),
        "notes": [str(note) for note in report.get("notes") or []],
        "interference": [
            {
                "pair": " and ".join(map(str, one["pair"])),
                "cosine": views.score_text("cosine", views.number(one["cosine"])),
            }
            for one in report.get("interference") or []
        ],
        "worst": [{"module": one["module"], "error": f"{100 * one['relative_error']:.2f} %"} for one in worst],
    }
