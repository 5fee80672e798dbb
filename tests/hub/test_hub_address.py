"""What a person writes for an adapter on the Hub: folders of a repository, and addresses copied from a browser."""

from pathlib import Path

import pytest

from adapterhub_local.errors import BadFile, InputError
from adapterhub_local.hub import pull
from adapterhub_local.hub.address import Address
from adapterhub_local.registry import Registry
from tests.hub_adapters import peft_files
from tests.hub_server import HubServer, Repo

REPO = "someone/many"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("org/repo", Address("org/repo")),
        ("org/repo@v1", Address("org/repo", None, "v1")),
        ("org/repo/sub", Address("org/repo", "sub")),
        ("org/repo/a/b@v1", Address("org/repo", "a/b", "v1")),
        ("https://huggingface.co/org/repo", Address("org/repo")),
        ("https://huggingface.co/org/repo/", Address("org/repo")),
        ("https://huggingface.co/org/repo/tree/main", Address("org/repo")),
        ("https://huggingface.co/org/repo/tree/v1/sub", Address("org/repo", "sub", "v1")),
        ("https://huggingface.co/org/repo/blob/main/sub/adapter_model.safetensors", Address("org/repo", "sub")),
        ("https://huggingface.co/org/repo/resolve/main/adapter_config.json?download=true", Address("org/repo")),
        ("https://huggingface.co/org/repo/discussions/3", Address("org/repo")),
        ("http://hf.co/org/repo", Address("org/repo")),
    ],
)
def test_address_is_parsed(text: str, address: Address) -> None:
    """Repository, folder and revision, however they are written."""
    assert Address.parse(text) == address


@pytest.mark.parametrize(
    "text",
    ["https://example.com/org/repo", "https://huggingface.co/org", "https://huggingface.co/datasets/a/b",
     "org/repo/../x", "ftp://huggingface.co/a/b", "org/repo/a b", "https://huggingface.co.evil.example/a/b"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    """Other hosts, other kinds of repositories and paths that lead out are refused."""
    with pytest.raises(InputError):
        Address.parse(text)


def test_adapters_in_folders_are_found_and_named(hub: HubServer, registry: Registry, tmp_path: Path) -> None:
    """A repository of several adapters names them, each is pulled by its folder, and is not taken for another."""
    files = peft_files(tmp_path / "peft")
    hub.repos[REPO] = repo = Repo()
    repo.commit({f"{folder}/{name}": data for folder in ("one", "deep/two") for name, data in files.items()})

    with pytest.raises(BadFile, match=f"There are adapters at {REPO}/deep/two, {REPO}/one: name one of them"):
        pull(registry, REPO, token=hub.token, endpoint=hub.endpoint)
    there = {"name": "x", "token": hub.token, "endpoint": hub.endpoint}
    first = pull(registry, f"{REPO}/one", **there)
    second = pull(registry, REPO, subfolder="deep/two", **there)
    again = pull(registry, f"https://huggingface.co/{REPO}/tree/main/one", **there)

    assert first.version.lineage["pulled_from"]["subfolder"] == "one"
    assert (first.version.number, second.version.number) == (1, 2)
    assert (again.version.number, again.is_new) == (1, False)
    with pytest.raises(BadFile, match=f"folder three is not a LoRA adapter.*{REPO}/one"):
        pull(registry, f"{REPO}/three", **there)
