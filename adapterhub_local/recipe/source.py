"""Where examples come from, as a recipe names it: a file beside the recipe, or files of a dataset on the Hub."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
PACKED = (".gz", ".bz2", ".xz", ".zst")
SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val", "eval", "dev")}  # role -> its names
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
    """`.jsonl`, `.csv` and so on, of a name that may end in `.gz` or its like; None if it cannot be read."""
    name = str(path).lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def local_problem(path: Path) -> str | None:
    """Why a local file, folder or pattern cannot be the data, or None."""
    if os.path.isfile(path):
        return None
    if os.path.isdir(path):
        ends = f"{', '.join(SUFFIXES)}, or the same with {', '.join(PACKED)}"
        return None if local_files(path, "train") else f"the folder {path} has no data files (names that end in {ends})"
    if is_pattern(path):
        return None if local_files(path, "train") else f"no file matches {path}"
    return f"{path} is a device or a pipe, not a file" if os.path.exists(path) else f"there is no file {path}"


def is_pattern(path: Path) -> bool:
    """Whether it stands for the files whose names it matches: `data/*.jsonl`."""
    return any(mark in str(path) for mark in "*?[") and not os.path.exists(path)


def local_files(path: Path, role: str) -> list[Path]:
    """The data files that a path names, in the order of their names: a file, a folder's, or those a pattern matches.

    Of a folder with files of several splits (by their names, or as `save_to_disk` writes them) those of `role`, which
    is train or test.
    """
    if is_pattern(path):
        found = sorted(glob.glob(str(path), recursive=True))
        return [Path(name) for name in found if os.path.isfile(name)]
    if not os.path.isdir(path):
        return [path]
    splits = [folder for name in SPLITS[role] if (folder := path / name).is_dir()]
    if (path / "dataset_dict.json").is_file() and splits:  # of datasets.DatasetDict.save_to_disk
        path = splits[0]
    files = sorted(file for file in path.iterdir() if data_suffix(file) and _is_data(file))
    if (path / "state.json").is_file():  # of datasets.Dataset.save_to_disk
        return [file for file in files if file.suffix == ".arrow"]
    of_split = {file: set(re.split(r"[^a-z]+", file.name.lower())) for file in files}
    own = [file for file, words in of_split.items() if words & set(SPLITS[role])]
    known = {name for names in SPLITS.values() for name in names}
    return own or [file for file, words in of_split.items() if not words & known]


def _is_data(file: Path) -> bool:
    described = ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json")
    return file.is_file() and not file.name.startswith((".", "_")) and file.name not in described


def shown(source: Source) -> str:
    """A source without this machine's folders."""
    return str(source) if isinstance(source, HubFiles) else source.name
