"""Fetch a base model's files from the Hub; adapters are `push` and `pull`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_local.hub.client import hub_errors

if TYPE_CHECKING:
    from adapterhub_local.base.source import Source

FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]


@dataclass(frozen=True)
class FetchedModel:
    """A model's files in the Hub's own cache, and what the Hub says of it."""

    folder: Path
    commit: str
    is_private: bool
    licence: str | None


def fetch_model(repo_id: str, revision: str | None) -> FetchedModel:
    """Download what a base is made from, into the Hub's own cache.

    Pickled weights and code are not fetched. Raises NotFound or HubError.
    """
    from huggingface_hub import HfApi

    with hub_errors(repo_id, revision):
        api = HfApi()
        info = api.model_info(repo_id, revision=revision)
        assert info.sha is not None, "the Hub names the commit of every revision"
        folder = Path(api.snapshot_download(repo_id, revision=info.sha, allow_patterns=FILES))
        licence = getattr(info.card_data, "license", None)
        return FetchedModel(folder, info.sha, bool(info.private), licence if isinstance(licence, str) else None)


def open_model(text: str) -> "Source":
    """The 16-bit model that a folder, a `.gguf` file or a Hub id (ORG/NAME@REVISION) names."""
    from adapterhub_local.base.source import open_source

    path = Path(os.path.expanduser(text))
    if not path.exists() and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        repo_id, _, revision = text.partition("@")
        path = fetch_model(repo_id, revision or None).folder
    return open_source(path)
