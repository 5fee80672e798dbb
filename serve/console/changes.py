"""What the forms of an adapter's page do. A form that is refused returns the page with the reason: nothing was changed.

Whatever moves or replaces something sends what the page showed of it, so that two tabs do not overwrite each other.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import RedirectResponse, Response

from adapterhub_local.errors import InputError, NotFound, QhubError
from adapterhub_local.refs import check_alias, check_name
from adapterhub_local.registry.marks import describe, description_of, remove_alias, rollback, rollback_target
from adapterhub_local.registry.protecting import approve
from serve.access import Scope, access
from serve.auth import check_models
from serve.console import views
from serve.console.adapter_page import adapter_page
from serve.console.forms import Fields, read_form
from serve.console.pointing import PLACE, protection_text
from serve.console.render import HEADERS, render, shown
from serve.console.texts import seal
from serve.errors import error_body
from serve.registry_api.bodies import MAX_DESCRIPTION, AliasBody
from serve.registry_api.changing import change_tags, move_alias
from serve.registry_api.library import Library
from serve.registry_api.reading import Text, key_of

Form = Annotated[Fields, Depends(read_form)]
UNREADABLE = "this form cannot be read: load its page again"


def add_changes(app: FastAPI, library: Library) -> None:
    """Add them."""
    _add_aliases(app, library)

    @app.post("/console/approvals", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def approvals(request: Request, form: Form) -> Response:
        """Hold a version fit for an alias, or take that back."""

        def act() -> None:
            version = library.resolve(key_of(request), form.one("reference"))
            approve(library.registry, version, form.one("alias"), is_given=form.one("do") != "withdraw")

        return _on_page(library, request, form.one("reference"), "aliases", act)

    @app.post("/console/tags", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def tags(request: Request, form: Form) -> Response:
        """Give a tag to a version, or take it off."""
        given, reference = [form.one("tag")], form.one("reference")
        add, remove = ([], given) if form.one("do") == "remove" else (given, [])
        return _on_page(
            library, request, reference, "about", lambda: change_tags(library, key_of(request), reference, add, remove)
        )

    @app.post("/console/description", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def description(request: Request, form: Form) -> Response:
        """Describe a version, if its description is still the one that the page showed."""

        def act() -> None:
            version = library.resolve(key_of(request), form.one("reference"))
            now = str(description_of(library.registry, version) or "")
            expected = now if seal(now) == form.one("state") else form.one("state")  # a seal is no description
            if len(form.one("text")) > MAX_DESCRIPTION:
                raise InputError(f"a description has at most {MAX_DESCRIPTION:,} letters: write less")
            describe(library.registry, version, form.one("text"), expect=expected)

        return _on_page(library, request, form.one("reference"), "about", act)

    @app.post("/console/hold", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def hold(request: Request, form: Form) -> Response:
        """Keep a version in the server's memory, or no longer."""

        def act() -> None:
            if library.hands is None:
                raise NotFound("there is no model here that could keep an adapter: `qhub serve` has one")
            key, reference = key_of(request), form.one("reference")
            version = library.resolve(key, reference)
            if form.one("do") == "release":
                held = form.one("held") or str(version)
                if held not in library.hands.state(version, key)["held_as"]:
                    raise NotFound(f"{version} is not held as '{held[:100]}' any more: nothing was changed")
                library.hands.release(held, key)
            else:
                library.hands.load(str(version), key, replace=True, pinned=form.one("do") == "pin")

        return _on_page(library, request, form.one("reference"), "held", act)


def _add_aliases(app: FastAPI, library: Library) -> None:
    @app.post(PLACE, include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def alias(request: Request, form: Form) -> Response:
        """Move an alias, if it is still where the page showed it."""
        name = form.one("name")

        def act() -> None:
            moved, version = form.one("alias"), form.number("version")
            try:
                state = json.loads(form.one("state") or "{}")
                expected = state.get(moved) if isinstance(state, dict) else None
            except (ValueError, RecursionError):
                raise InputError(UNREADABLE) from None
            if version is None or version < 1:
                raise InputError("write the number of the version that the alias is to point to")
            if expected is not None and (isinstance(expected, bool) or not isinstance(expected, int)):
                raise InputError(UNREADABLE)
            body = AliasBody.model_construct(
                {"alias", "version", "expect"}, alias=moved, version=version, expect=expected
            )
            move_alias(library, key_of(request), name, body)

        return _on_page(library, request, name, "aliases", act, version=form.one("v"))

    @app.get(PLACE, include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def confirm(request: Request, name: Text = None, alias: Text = None, do: Text = None) -> Response:
        """What rolling an alias back or removing it would do, and the button that does it."""
        return _confirm(library, request, name or "", alias or "", do or "")

    @app.post(f"{PLACE}/rollback", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def roll_back(request: Request, form: Form) -> Response:
        """Point an alias to where it pointed before, if all is as the page showed it."""

        def act(name: str, alias: str, expected: int) -> None:
            to = form.number("to")
            if to is None or to < 1:
                raise InputError(UNREADABLE)
            rollback(library.registry, name, alias, expect=expected, to=to)

        return _confirmed(library, request, form, "rollback", act)

    @app.post(f"{PLACE}/remove", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def remove(request: Request, form: Form) -> Response:
        """Remove an alias, if it is still where the page showed it."""
        return _confirmed(
            library, request, form, "remove",
            lambda name, alias, expected: remove_alias(library.registry, name, alias, expect=expected),
        )  # fmt: skip


def _on_page(
    library: Library, request: Request, reference: str, place: str, act: Callable[[], Any], *, version: str = ""
) -> Response:
    """Do something with a version and show its page again, with the reason if it was refused."""
    name, _, number = reference.partition("@")
    number = number or version
    try:
        act()
    except QhubError as error:
        check_models(key_of(request), [name])
        library.registry.resolve(f"{name}@{number}" if number else name)  # else there is no page to show it on
        return adapter_page(library, request, name, number or None, str(error), error_body(error).status)
    return _to(f"{views.version_link(f'{name}@{number}' if number else name)}#{place}")


def _confirm(
    library: Library, request: Request, name: str, alias: str, do: str, message: str | None = None, status: int = 200
) -> Response:
    """The page that asks once more, with all that will change."""
    check_models(key_of(request), [check_name(name)])
    check_alias(alias)
    if do not in ("rollback", "remove"):
        raise InputError("an alias is rolled back or removed: go to its adapter's page and choose there")
    found = library.adapter(key_of(request), name, limit=1)
    now = found["aliases"].get(alias)
    if now is None:
        raise NotFound(f"there is no alias {name}@{alias}: its adapter's page shows those that there are")
    protection = next((one for one in found["protections"] if one["alias"] == alias), None)
    split = [one["share"] for one in found["split"] if one["alias"] == alias]
    return render(
        request, "alias.html", status=status, name=name, alias=alias, do=do, now=now, message=message,
        back=rollback_target(library.registry, name, alias), protection=protection_text(protection),
        link=views.version_link(name), is_split=bool(split),
    )  # fmt: skip


def _confirmed(
    library: Library, request: Request, form: Fields, do: str, act: Callable[[str, str, int], Any]
) -> Response:
    name, alias = form.one("name"), form.one("alias")
    check_models(key_of(request), [check_name(name)])
    try:
        expected = form.number("expect")
        if expected is None or expected < 1:
            raise InputError(UNREADABLE)
        act(name, check_alias(alias), expected)
    except QhubError as error:
        return _confirm(library, request, name, alias, do, str(error), error_body(error).status)
    return _to(f"{views.version_link(name)}#aliases")


def _to(path: str) -> Response:
    return RedirectResponse(path, 303, HEADERS)
