"""Methods side by side: what several merges of the same adapters answer to held-out examples, before one is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import ValidationError

from adapterhub_local.errors import InputError, NotFound, QhubError
from adapterhub_local.keys import Key
from adapterhub_local.merge.methods import METHODS, parameters
from adapterhub_local.merge.spelled import RULES
from adapterhub_local.refs import parse_weight
from serve.access import Scope, access
from serve.console import views
from serve.console.actions import Form
from serve.console.budget import fitted, part
from serve.console.forms import Weighted
from serve.console.render import HEADERS, render, shown
from serve.console.texts import LINE, cut
from serve.console.workbench import MAX_CHOICES, choices
from serve.errors import error_body
from serve.registry_api.bodies import MAX_MERGED
from serve.registry_api.library import Library
from serve.registry_api.methods import MAX_EXAMPLES, MAX_METHODS, MethodsBody, try_merges
from serve.registry_api.reading import Text, key_of
from serve.registry_api.starting import FOLDER, recipes_here

PLACE = "/console/merge/methods"
RUNS = 20  # of the newest, whose held-out data can be chosen
CELL, PROMPT = 320, 500  # bytes of an answer and of a prompt
Texts = Annotated[list[str] | None, Query(max_length=MAX_MERGED)]
Methods = Annotated[list[Annotated[str, Query(max_length=300)]] | None, Query(max_length=MAX_METHODS)]


@dataclass(frozen=True)
class Asked(Weighted):
    """What the form says, as text: adapters with weights, methods, whose held-out data, and how many examples."""

    adapters: Sequence[str] = ()
    weights: Sequence[str] = ()
    methods: Sequence[str] = ()
    data: str = ""  # `recipe:sums.toml` or `run:sums-1234`
    examples: str = ""

    def body(self) -> MethodsBody:
        """What is asked for. Raises InputError, BadReference."""
        if not self.rows:
            raise InputError("choose the adapters to merge")
        methods = [text for text in self.methods if text]
        if not methods:
            raise InputError("write the methods to compare, such as weighted_sum and ties density=0.2")
        kind, _, name = self.data.partition(":")
        if kind not in ("recipe", "run") or not name:
            raise InputError("choose the recipe or the run whose held-out examples are asked")
        try:
            return MethodsBody(
                adapters=[one for one, _ in self.rows], weights=[parse_weight(weight) for _, weight in self.rows],
                methods=methods, recipe=name if kind == "recipe" else None, run=name if kind == "run" else None,
                examples=_whole(self.examples or "10"),
            )  # fmt: skip
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def query(self) -> dict[str, Any]:
        """What an address says of it."""
        rows = {"m": [one for one, _ in self.rows], "w": [weight for _, weight in self.rows]}
        return {**rows, "f": list(self.methods), "data": self.data, "examples": self.examples}


def add_methods_page(app: FastAPI, library: Library) -> None:
    """Add the page and what its form does."""

    @app.get(PLACE, include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def page(
        request: Request, m: Texts = None, w: Texts = None, f: Methods = None, data: Text = None, examples: Text = None,
        job: Text = None,
    ) -> Response:  # fmt: skip
        """What several merges answer, side by side."""
        methods = f or [_from_workbench(request.query_params), "", "", ""]
        return methods_page(library, request, Asked(m or [], w or [], methods, data or "", examples or ""), job)

    @app.post(PLACE, include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def ask(request: Request, form: Form) -> Response:
        """Ask them."""
        asked = Asked(form.every("m"), form.every("w"), form.every("f"), form.one("data"), form.one("examples"))
        try:
            job = try_merges(library, key_of(request), asked.body())
        except QhubError as error:
            body = error_body(error)
            response = methods_page(library, request, asked, None, body.message, body.status)
            response.headers.update(dict(body.headers))
            return response
        return RedirectResponse(views.with_query(PLACE, **asked.query(), job=job.id), 303, HEADERS)


def methods_page(
    library: Library, request: Request, asked: Asked, job: str | None, message: str | None = None, status: int = 200
) -> Response:
    """The form as it was filled in, and what came of it."""
    key = key_of(request)
    try:
        found = _job(library, key, job)
    except NotFound as error:  # the server was started again since: the form is still good
        found, message = None, message or str(error)
    result = views.mapping(found["result"]) if found else {}
    sources, offered = _sources(library, key), choices(library, request)
    filled = [{"reference": one, "weight": weight} for one, weight in asked.rows[:MAX_MERGED]]
    methods = [*asked.methods, *[""] * MAX_METHODS][:MAX_METHODS]

    def drawn(share: float) -> Response:
        return render(
            request, "methods.html", status=status, message=message, rows=filled, empty=range(max(0, 2 - len(filled))),
            methods=methods, known=list(METHODS), settings=", ".join([*parameters(), *RULES]), asked=asked,
            sources=sources, folder=FOLDER, most=MAX_EXAMPLES, choices=offered[: part(MAX_CHOICES, share)], job=found,
            columns=[_column(one) for one in result.get("columns") or []],
            examples=[_example(one, result["columns"], share) for one in result.get("examples") or []],
            facts={name: result.get(name) for name in ("task", "recipe", "rows", "rows_held_out", "known_to")},
            merge_link=views.with_query("/console/merge", m=[one for one, _ in asked.rows],
                                        w=[weight for _, weight in asked.rows]),
        )  # fmt: skip

    return fitted(drawn)


def _job(library: Library, key: Key | None, identity: str | None) -> dict[str, Any] | None:
    if not identity:
        return None
    found = library.job(key, identity)
    if found.kind != "methods":
        raise NotFound("that job is about something else")
    return found.to_json()


def _sources(library: Library, key: Key | None) -> list[dict[str, str]]:
    """Whose held-out data can be asked: recipes of the machine that can be read, and the newest runs."""
    recipes = [one for one in recipes_here(library, key) if not one["problem"]]
    runs = library.runs(key, limit=RUNS).entries
    found = [{"value": f"recipe:{one['recipe']}", "text": f"{one['recipe']}: {one['name']}"} for one in recipes]
    found += [{"value": f"run:{one['id']}", "text": f"the run {one['id']}"} for one in runs]
    return [{**one, "text": cut(one["text"], LINE)} for one in found]


def _from_workbench(query: Mapping[str, str]) -> str:
    """The method of the merge workbench, with its settings, as one text."""
    method = query.get("method") or "weighted_sum"
    row = METHODS.get(method)
    names = [*(row.parameters if row is not None else ()), *RULES]
    words = [f"{name}={query[name]}" for name in names if query.get(name)]
    return " ".join([method, *words])[:300]


def _column(column: Mapping[str, Any]) -> dict[str, Any]:
    scores, error = views.mapping(column.get("scores")), views.number(column.get("relative_error"))
    loss = views.number(scores.get("loss"))
    return {
        "name": cut(column.get("name"), LINE),
        "score": views.score_row(str(column.get("name")), "exact_match", scores, {}),
        "loss": "" if loss is None else f"{loss:.4f}",
        "rank": views.count_text(column.get("rank")),
        "error": "" if error is None else f"{100 * error:.2f} %",
    }


def _example(example: Mapping[str, Any], columns: Sequence[Mapping[str, Any]], share: float) -> dict[str, Any]:
    answers = [
        {
            "of": cut(column.get("name"), 60),
            "text": cut(one.get("text"), part(CELL, share)),
            "is_exact": one["is_exact"],
        }
        for one, column in zip(example["answers"], columns, strict=False)
    ]
    prompt = str(example.get("prompt") or "")
    most = part(PROMPT, share)
    # what is asked stands at the end of a prompt
    return {
        "prompt": cut(prompt if len(prompt) <= most else f"… {prompt[-most:]}", 2 * most),
        "wanted": cut(example.get("wanted"), part(CELL, share)),
        "answers": answers,
    }


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"examples is {text[:40]!r}: it must be a whole number") from None
