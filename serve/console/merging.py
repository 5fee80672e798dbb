"""The merge workbench: what a merge loses before it is made, and making it. The form stays, whatever comes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import ValidationError

from adapterhub_local.errors import InputError, NotFound, QhubError
from adapterhub_local.keys import Key
from adapterhub_local.merge.methods import METHODS, parameters
from adapterhub_local.refs import parse_weight
from serve.access import Scope, access
from serve.console import views
from serve.console.budget import fitted, part
from serve.console.forms import Fields, Weighted, read_form
from serve.console.rank_curve import by_rank
from serve.console.render import HEADERS, render, shown
from serve.console.texts import LINE, cut
from serve.console.workbench import MAX_CHOICES, choices
from serve.errors import error_body
from serve.registry_api.bodies import MAX_MERGED, MergeBody
from serve.registry_api.library import Library
from serve.registry_api.merging import start_merge
from serve.registry_api.reading import Text, key_of

Texts = Annotated[list[str] | None, Query(max_length=MAX_MERGED)]
PLACE = "/console/merge"
PAIRS = 120  # of adapters, whose cosines are shown: all of the largest merge
RULES = {"rank": "Rank", "energy": "Energy to keep", "max_error": "Error at most"}  # what is kept: one of them
HINTS = {"rank": "exact", "energy": "0.99", "max_error": "0.01"}


@dataclass
class Asked(Weighted):
    """What the form says, as text: adapters with weights, the method, its parameters, what is kept, name and alias."""

    adapters: Sequence[str] = ()
    weights: Sequence[str] = ()
    method: str = "weighted_sum"
    settings: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    alias: str = ""

    def body(self) -> MergeBody:
        """The merge that is asked for. Raises InputError, BadReference."""
        if not self.rows:
            raise InputError("choose the adapters to merge")
        given = {name: text for name, text in self.settings.items() if text}
        known = parameters()
        rules: dict[str, Any] = {
            name: _number(name, text, whole=name == "rank") for name, text in given.items() if name in RULES
        }
        try:
            return MergeBody(
                adapters=[one for one, _ in self.rows], weights=[parse_weight(weight) for _, weight in self.rows],
                method=self.method, name=self.name or None, alias=self.alias or None, **rules,
                parameters={name: _value(name, text) for name, text in given.items() if name in known},
            )  # fmt: skip
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{'.'.join(map(str, first['loc'])).replace('_', ' ')}: {first['msg']}") from None

    def query(self) -> dict[str, Any]:
        """What an address says of it, for a page that can be kept."""
        rows = {"m": [one for one, _ in self.rows], "w": [weight for _, weight in self.rows]}
        return {**rows, "method": self.method, **self.settings}


def _number(name: str, text: str, *, whole: bool) -> float:
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise InputError(f"{name} is {text[:40]!r}: it must be a {'whole ' if whole else ''}number") from None


def _value(name: str, text: str) -> float | str:
    kind = next(iter(parameters()[name].values())).kind
    return text if kind is str else _number(name, text, whole=kind is int)


def add_merging(app: FastAPI, library: Library) -> None:
    """Add the page and what its forms do."""

    @app.get(PLACE, include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def merge(
        request: Request, m: Texts = None, w: Texts = None, method: Text = None, job: Text = None, made: Text = None,
        more: Text = None,
    ) -> Response:  # fmt: skip
        """What a merge would lose, before it is made."""
        settings = {name: request.query_params.get(name, "")[:100] for name in (*RULES, *parameters())}
        asked = Asked(m or [], w or [], method or "weighted_sum", settings)
        return merge_page(library, request, asked, job, made, rows=len(asked.adapters) + bool(more))

    @app.post(PLACE, include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def start(request: Request, form: Annotated[Fields, Depends(read_form)]) -> Response:
        """Merge, or see what that would lose."""
        settings = {name: form.one(name) for name in (*RULES, *parameters())}
        adapters, weights = form.every("m"), form.every("w")
        asked = Asked(
            adapters, weights, form.one("method") or "weighted_sum", settings, form.one("name"), form.one("alias")
        )
        job = form.one("job")
        try:
            started = start_merge(library, key_of(request), asked.body())
        except QhubError as error:
            body = error_body(error)
            page = merge_page(library, request, asked, job, None, message=body.message, status=body.status)
            page.headers.update(dict(body.headers))
            return page
        jobs = {"job": started.id} if not asked.name else {"job": job, "made": started.id}
        return RedirectResponse(views.with_query(PLACE, **asked.query(), **jobs), 303, HEADERS)


def merge_page(
    library: Library, request: Request, asked: Asked, job: str | None, made: str | None, *,
    rows: int = 0, message: str | None = None, status: int = 200,
) -> Response:  # fmt: skip
    """The form as it was filled in, what was computed, and what is made of it."""
    try:
        preview, merged = (_job(library, key_of(request), *one) for one in ((job, "preview"), (made, "merge")))
    except NotFound as error:  # the server was started again since: the form is still good
        preview, merged, message = None, None, message or str(error)
    report = views.mapping(preview["result"]) if preview else {}
    filled = [{"reference": one, "weight": weight} for one, weight in asked.rows]
    empty = max(2, min(rows, MAX_MERGED)) - len(filled)
    reference = str(views.mapping(merged["result"]).get("reference") or "") if merged else ""
    offered = choices(library, request)

    def drawn(share: float) -> Response:
        return render(
            request, "merge.html", status=status, rows=filled, empty=range(empty), asked=asked, message=message,
            most=MAX_MERGED, methods=list(METHODS), rules=_fields(asked, RULES), parameters=_parameters(asked),
            choices=offered[: part(MAX_CHOICES, share)], job=preview, report=_report(report, share) if report else None,
            made=merged, made_reference=reference, made_link=views.version_link(reference) if reference else None,
            is_live=any(one is not None and one["state"] == "running" for one in (preview, merged)),
            by_rank=by_rank(report, share),
            heat=views.cosines(report.get("modules", []), "Cosines of the two by module and layer")
            if len(filled) == 2 else None,
        )  # fmt: skip

    return fitted(drawn)


def _cosine(one: Any) -> float:
    """Of a pair of adapters: what pulls in opposite directions comes first, what has no direction last."""
    found = views.number(one.get("cosine"))
    return 2.0 if found is None else found


def _job(library: Library, key: Key | None, identity: str | None, kind: str) -> dict[str, Any] | None:
    if not identity:
        return None
    found = library.job(key, identity)
    if found.kind != kind:
        raise NotFound("that job is about something else")
    return found.to_json()


def _fields(asked: Asked, labels: Mapping[str, str]) -> list[dict[str, str]]:
    return [
        {"name": name, "label": label, "value": asked.settings.get(name, ""), "hint": HINTS[name]}
        for name, label in labels.items()
    ]


def _parameters(asked: Asked) -> list[dict[str, Any]]:
    """Every parameter of the methods: its field, and which methods take it."""
    fields = []
    for name, rows in parameters().items():
        own = rows.get(asked.method)
        one = own or next(iter(rows.values()))
        fields.append(
            {"name": name, "value": asked.settings.get(name, ""), "hint": str(own.default) if own else "",
             "choices": one.choices, "help": one.help, "methods": ", ".join(rows)}
        )  # fmt: skip
    return fields


def _report(report: Any, share: float) -> dict[str, Any]:
    figures = {name: views.number(report.get(name)) for name in ("relative_error", "retained_energy", "kept")}
    shown_as = {name: "" if value is None else f"{100 * value:.2f} %" for name, value in figures.items()}
    modules = [one for one in report.get("modules", []) if views.number(one.get("relative_error")) is not None]
    worst = sorted(modules, key=lambda one: -float(one["relative_error"]))[:8]
    return {
        **shown_as,
        "exact_error": figures["relative_error"],
        "rank": report.get("rank"),
        "exact_rank": report.get("exact_rank"),
        "notes": [str(note) for note in report.get("notes") or []],
        "more_interference": max(0, len(report.get("interference") or []) - part(PAIRS, share)),
        "interference": [
            {
                "pair": cut(" and ".join(map(str, one["pair"])), 2 * LINE),
                "cosine": views.score_text("cosine", views.number(one["cosine"])),
            }
            for one in sorted(report.get("interference") or [], key=_cosine)[: part(PAIRS, share)]
        ],
        "worst": [{"module": one["module"], "error": f"{100 * one['relative_error']:.2f} %"} for one in worst],
    }
