"""The table of all recipe keys in recipes/README.md: `python -m adapterhub_local.recipe.reference` prints it."""

import sys
from dataclasses import MISSING
from typing import Any

from adapterhub_local.recipe.field import keys
from adapterhub_local.recipe.schema import TABLES


def reference() -> str:
    """A Markdown table: key, default, meaning."""
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for table, schema in TABLES.items():
        for key, item in keys(schema).items():
            default = "required" if item.default is MISSING else _shown(item.default)
            lines.append(f"| `{table}.{key}` | {default} | {item.metadata['meaning']} |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    sys.stdout.write(reference() + "\n")
