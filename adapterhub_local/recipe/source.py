"""Where examples come from, as a recipe names it: a file beside the recipe, or files of a dataset on the Hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
PREFIX = "hf://datasets/"
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_ADDRESS = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.-]+))?(?:/(.+))?", re.ASCII)


@dataclass(frozen=True)
class HubFiles:
    """A dataset on the Hub, at a revision if one is given, and one file in it; without `path` those of a split."""

    repo: str
    revision: str | None = None
    path: str | None = None

    def __str__(self) -> str:
        return (
            PREFIX + self.repo + (f"@{self.revision}" if self.revision else "") + (f"/{self.path}" if self.path else "")
        )


Source = Path | HubFiles


def read_source(text: str, folder: Path) -> Source:
    """The source that `text` names: `hf://datasets/ORG/NAME[@REVISION][/FILE]`, or a path relative to `folder`.

    `ORG/NAME[@REVISION]` alone is a dataset on the Hub, unless there is such a file or it ends as a data file does.
    """
    if text.startswith(PREFIX) and (match := _ADDRESS.fullmatch(text.removeprefix(PREFIX))):
        return HubFiles(*match.groups())
    path = folder / os.path.expanduser(text)
    is_file = os.path.exists(path) or data_suffix(path) is not None  # Path.exists raises for a name that is too long
    if not is_file and (match := _ID.fullmatch(text)):
        return HubFiles(*match.groups())
    return path


def data_suffix(path: Path | str) -> str | None:
    """`.jsonl`, `.csv` and so on, of a name that may end in `.gz`; None if it is not one that can be read."""
    name = str(path).lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def local_problem(path: Path) -> str | None:
    """Why a local file cannot be the data, or None."""
    if os.path.isdir(path):
        return f"{path} is a folder: name the files in it"
    if not os.path.isfile(path):
        return f"{path} is a device or a pipe, not a file" if os.path.exists(path) else f"there is no file {path}"
    return None


def shown(source: Source) -> str:
    """A source without this machine's folders."""
    return str(source) if isinstance(source, HubFiles) else source.name
