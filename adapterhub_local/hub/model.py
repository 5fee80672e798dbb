"""Fetch a base model's files from the Hub; adapters are `push` and `pull`."""

from pathlib import Path

from adapterhub_local.hub.client import hub_errors

FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]


def fetch_model(repo_id: str, revision: str | None) -> tuple[Path, str]:
    """Download what a base is made from, into the Hub's own cache; returns the folder and the commit.

    Pickled weights and code are not fetched. Raises NotFound or HubError.
    """
    from huggingface_hub import HfApi

    with hub_errors(repo_id, revision):
        api = HfApi()
        commit = api.model_info(repo_id, revision=revision).sha
        assert commit is not None, "the Hub names the commit of every revision"
        return Path(api.snapshot_download(repo_id, revision=commit, allow_patterns=FILES)), commit
