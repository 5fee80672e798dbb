"""Fetch the files of a dataset from the Hub: a file that is named, or those of a split as the dataset's card says."""

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from adapterhub_local.errors import NotFound
from adapterhub_local.hub.client import check_repo_id, hub_errors
from adapterhub_local.recipe.source import PREFIX, data_suffix

SPLITS = {"train": ("train", "training"), "test": ("test", "validation", "valid", "val", "dev", "eval")}
CARD = "README.md"


def fetch_dataset(repo_id: str, revision: str | None, path: str | None, role: str) -> tuple[list[Path], str]:
    """Download `path` (a name or a pattern), or the files of the split for `role` (train or test).

    Returns them in the Hub's own cache, and the commit. Raises NotFound, naming what there is, or HubError.
    """
    from huggingface_hub import HfApi, hf_hub_download

    check_repo_id(repo_id)
    with hub_errors(repo_id, revision):
        info = HfApi().dataset_info(repo_id, revision=revision)
        commit = info.sha
        assert commit is not None, "the Hub names the commit of every revision"
        names = sorted(sibling.rfilename for sibling in info.siblings or ())

        def fetch(name: str) -> Path:
            return Path(hf_hub_download(repo_id, name, repo_type="dataset", revision=commit))

        card = fetch(CARD).read_text(encoding="utf-8", errors="replace") if CARD in names and path is None else ""
        chosen = fnmatch.filter(names, path) if path else choose_files(names, read_configs(card), role)
        if not chosen:
            wanted = f"file {path}" if path else f"{role} split"
            known = [name for name in names if data_suffix(name)]
            shown = ", ".join(known[:6]) + (", ..." if len(known) > 6 else "")
            raise NotFound(
                f"the dataset {repo_id} has no {wanted} that can be read (there is {shown or 'no data file'}): "
                f"name a file as {PREFIX}{repo_id}/FILE"
            )
        return [fetch(name) for name in chosen], commit


def choose_files(names: Sequence[str], patterns: dict[str, list[str]], role: str) -> list[str]:
    """The data files for a role: by the card's patterns, else by a split's name in the path, else the only file."""
    data = [name for name in names if data_suffix(name)]
    for split in SPLITS[role]:
        by_card = [name for pattern in patterns.get(split, ()) for name in fnmatch.filter(data, pattern)]
        in_path = [name for name in data if re.search(rf"(?:^|[/_.-]){split}(?:[/_.-]|$)", name)]
        if chosen := by_card or ([] if patterns else in_path):
            return list(dict.fromkeys(chosen))
    return data if role == "train" and len(data) == 1 else []


def read_configs(card: str) -> dict[str, list[str]]:
    """Split -> patterns of its files, of the default configuration in a card's front matter; {} if it says nothing."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    configs = front.get("configs") if isinstance(front, dict) else None
    configs = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    configs.sort(key=lambda config: (not config.get("default"), config.get("config_name") != "default"))
    return _patterns(configs[0].get("data_files")) if configs else {}


def _patterns(files: Any) -> dict[str, list[str]]:
    entries = files if isinstance(files, list) else [files]
    patterns: dict[str, list[str]] = {}
    for entry in entries:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        listed = paths if isinstance(paths, list) else [paths]
        patterns.setdefault(str(split), []).extend(item for item in listed if isinstance(item, str))
    return {split: found for split, found in patterns.items() if found}
