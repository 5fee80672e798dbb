"""Values that are JSON in text: CSV and many Parquet files have no other way to hold a list or a table."""

import json
from typing import Any

from adapterhub_local.errors import BadData


def parsed(value: Any) -> Any:
    """`value`, or the list or table that it is the JSON text of."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def check_json_text(value: Any, column: str, where: str) -> None:
    """Raise BadData for text that seems to be a list and is not JSON, such as what Python prints."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        python = (
            ": this is how Python prints it, write it with json.dumps"
            if value.lstrip()[1:3].strip("{ [") == "'"
            else ""
        )
        raise BadData(f"{where}: the column {column} is text that is not JSON{python}")
