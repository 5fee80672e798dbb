"""The playground, where adapters are tried. A link to it runs nothing."""

from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response

from adapterhub_local.errors import NotFound
from adapterhub_local.registry.listing import Wanted
from serve.access import Scope, access
from serve.console.render import render, shown
from serve.registry_api.library import Library
from serve.registry_api.reading import Text, key_of

Texts = Annotated[list[str] | None, Query(max_length=8)]
Long = Annotated[str | None, Query(max_length=20_000)]
MAX_COLUMNS = 6
MAX_TOKENS = 4096  # of an answer
MAX_CHOICES = 200  # names that are offered


def add_workbench(app: FastAPI, library: Library) -> None:
    """Add it."""

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
        offered = choices(library, request)
        columns = [one for one in m or [] if one][:MAX_COLUMNS] or [base, *offered[:1]]
        return render(
            request, "play.html", columns=columns, prompt=prompt or "", system=system or "", choices=[base, *offered],
            form="text" if form == "text" else "chat", temperature=_within(temperature, 0.0, 2.0, 0.0),
            tokens=_within(tokens, 1, MAX_TOKENS, 128), max_tokens=MAX_TOKENS,
            has_probabilities=probabilities == "1", is_blind=blind == "1",
        )  # fmt: skip


def _within(text: str | None, low: float, high: float, default: float) -> str:
    """The number of an address, the default for what is none or is out of bounds."""
    try:
        value = type(low)(text or default)
    except ValueError:
        value = default
    return f"{value if low <= value <= high else default:g}"


def choices(library: Library, request: Request) -> list[str]:
    """The newest versions of adapters, for a field to offer."""
    found = library.adapters(key_of(request), Wanted(sort="created"), limit=MAX_CHOICES)
    base = request.app.state.base_fingerprint
    return [entry["reference"] for entry in found.entries if base in (None, entry["base"]["fingerprint"])]
