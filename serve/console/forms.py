"""What a form of a page sends: fields, read as browsers write them."""

from collections.abc import Sequence
from urllib.parse import parse_qs

from fastapi import Request

from adapterhub_local.errors import InputError
from serve.console.session import check_own_page

MAX_FIELDS = 200


class Fields:
    """The fields of a form by name; a name may occur several times."""

    def __init__(self, fields: dict[str, list[str]]) -> None:
        self._fields = fields

    def one(self, name: str, default: str = "") -> str:
        """The first value of a field, without blanks around it."""
        return self._fields.get(name, [default])[0].strip()

    def all(self, name: str) -> list[str]:
        """Every value of a field that is not empty."""
        return [value.strip() for value in self._fields.get(name, []) if value.strip()]

    def every(self, name: str) -> list[str]:
        """Every value of a field, the empty ones in their places."""
        return [value.strip() for value in self._fields.get(name, [])]

    def number(self, name: str) -> int | None:
        """A whole number, None where nothing was written. Raises InputError."""
        text = self.one(name)
        if not text:
            return None
        try:
            return int(text)
        except ValueError:
            raise InputError(f"{name} is {text[:40]!r}: it must be a whole number") from None


async def read_form(request: Request) -> Fields:
    """The form that a page of ours sent. Raises Forbidden for one of another page, InputError for what is none."""
    check_own_page(request.headers)
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise InputError("a form is sent with the header 'Content-Type: application/x-www-form-urlencoded'")
    try:
        text = (await request.body()).decode("utf-8")
        return Fields(parse_qs(text, keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict"))
    except (ValueError, UnicodeError):
        raise InputError("this form cannot be read") from None


class Weighted:
    """What a form says of adapters that are merged: a row each, some of which may be empty."""

    adapters: Sequence[str]
    weights: Sequence[str]

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Adapter and weight of each row that says something."""
        return [(one, weight) for one, weight in zip(self.adapters, self.weights, strict=False) if one]
