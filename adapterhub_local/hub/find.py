"""What is on the Hub: adapters by words or base, and pulled ones that have changed there since."""

from collections.abc import Iterator
from dataclasses import dataclass

from huggingface_hub import HfApi

from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.hub.client import connect, hub_errors, is_model_id
from adapterhub_local.lora.config import WEIGHTS
from adapterhub_local.registry import Registry, Version

_BASE_TAG = "base_model:adapter:"  # how the Hub tags an adapter with its base


@dataclass(frozen=True)
class Found:
    """An adapter repository; `base` as its card names it."""

    repo_id: str
    base: str | None
    downloads: int
    likes: int
    updated: str | None
    from_qhub: bool


@dataclass(frozen=True)
class Freshness:
    """A pulled version and the head of the repository it came from.

    `newer` is True if the weights there are others now, None if that is not known, for the reason `problem`.
    """

    reference: str
    repo_id: str
    pulled_commit: str
    head: str | None = None
    newer: bool | None = None
    problem: str | None = None


def search_hub(
    words: str, *, base: str | None = None, limit: int = 20, token: str | None = None, endpoint: str | None = None
) -> list[Found]:
    """PEFT adapters whose id has `words` in it, most downloaded first; `base` is the Hub id of their base.

    Raises InputError for a base that is not an id, HubError.
    """
    if base is not None and not is_model_id(base):
        raise InputError(f"{base!r} is not the id of a model on the Hub: give --base ORG/MODEL")
    api = connect(endpoint, token)
    wanted = ["peft", *([f"{_BASE_TAG}{base}"] if base else [])]
    with hub_errors("the search", endpoint=api.endpoint):
        models = api.list_models(search=words or None, filter=wanted, sort="downloads", limit=limit, full=True)
        return [
            Found(
                model.id,
                next((tag.removeprefix(_BASE_TAG) for tag in model.tags or () if tag.startswith(_BASE_TAG)), None),
                model.downloads or 0,
                model.likes or 0,
                model.last_modified.date().isoformat() if model.last_modified else None,
                "qhub" in (model.tags or ()),
            )
            for model in models
        ]


def outdated(
    registry: Registry, name: str | None = None, *, token: str | None = None, endpoint: str | None = None
) -> Iterator[Freshness]:
    """Look up the newest pulled version of each name, or of one name: one call to the Hub for each repository.

    A commit that changed only other files, such as the card, does not count as newer.
    """
    api = connect(endpoint, token)
    pulled: dict[tuple[str, str], Version] = {}
    for version in registry.versions(name):
        if isinstance(origin := version.lineage.get("pulled_from"), dict) and origin.get("repo_id"):
            pulled[version.name, origin["repo_id"]] = version
    for (_, repo_id), version in pulled.items():
        yield _freshness(api, version, repo_id)


def _freshness(api: HfApi, version: Version, repo_id: str) -> Freshness:
    origin = version.lineage["pulled_from"]
    pushed = (str(version), repo_id, str(origin.get("commit")))
    try:
        with hub_errors(repo_id, endpoint=api.endpoint):
            info = api.model_info(repo_id, files_metadata=True)
    except QhubError as error:
        return Freshness(*pushed, problem=str(error))
    if info.sha == origin.get("commit"):
        return Freshness(*pushed, head=info.sha, newer=False)
    large = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs}
    weights = f"{origin['subfolder']}/{WEIGHTS}" if origin.get("subfolder") else WEIGHTS
    if weights not in large:
        return Freshness(*pushed, head=info.sha, problem=f"{repo_id} has no {weights} any more")
    before = origin.get("weights") or next((file.digest for file in version.files if file.path == WEIGHTS), None)
    return Freshness(*pushed, head=info.sha, newer=before != f"sha256:{large[weights]}")
