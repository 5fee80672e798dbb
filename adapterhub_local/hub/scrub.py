"""Values without paths of this machine, so that nothing private is published.

An absolute path becomes the name at its end; a path below the home, the working folder or the user's
folder becomes relative to it. Knows nothing of what the values mean.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

# Not inside a URL, a Hub id or a relative path: those have a letter, ':', '.' or '/' before the slash.
_ABSOLUTE = re.compile(r"(?<![\w:/\\.~-])(?:file:)?(?:~\w*|[A-Za-z]:)?[/\\]+(?:[\w.+@=-]+[/\\]+)+(?P<last>[\w.+@=-]*)")


def machine_roots(home: Path) -> tuple[str, ...]:
    """The folders that no published text may name, longest first: `home`, the working and the user's folder."""
    folders = [home]
    with suppress(OSError, RuntimeError):  # the working folder was removed, or there is no user's folder
        folders += [Path.cwd(), Path("~").expanduser()]
    spelled = {str(path) for folder in folders for path in (folder.absolute(), folder.resolve())}
    return tuple(sorted((root for root in spelled if len(Path(root).parts) > 1), key=len, reverse=True))


def without_paths(value: Any, roots: Iterable[str]) -> tuple[Any, list[str]]:
    """`value` (what JSON can hold) with paths cut short, and the places where that happened, such as `recipe.text`."""
    places: list[str] = []
    below = [re.compile(rf"(?<!\w){re.escape(root)}(?![\w.-])[/\\]?") for root in roots]

    def clean(text: str) -> str:
        for root in below:
            text = root.sub("", text)
        return _ABSOLUTE.sub(lambda match: match["last"], text)

    def walk(node: Any, place: str) -> Any:
        if isinstance(node, dict):
            return {clean(key): walk(child, f"{place}.{clean(key)}".lstrip(".")) for key, child in node.items()}
        if isinstance(node, list | tuple):
            return [walk(child, f"{place}[{index}]") for index, child in enumerate(node)]
        if isinstance(node, str) and clean(node) != node:
            places.append(place)
            return clean(node)
        return node

    return walk(value, ""), places
