"""The files of an adapter on the Hub: what is listed, what of that is fetched, and whether it came whole."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from adapterhub_local.durable import digest_file
from adapterhub_local.errors import BadFile, Corrupt, HubError, QhubError
from adapterhub_local.hub.package import MANIFEST
from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.registry.signature import SIGNATURE
from adapterhub_local.settings import Home, make_folder

PICKLED = "adapter_model.bin"
MAX_JSON_BYTES = 16 << 20


def download(
    api: HfApi, repo_id: str, revision: str | None, folder: Path, home: Home, subfolder: str | None = None
) -> tuple[str, set[str]]:
    """Fetch the adapter at `revision`, in `subfolder`, into `folder`; returns its commit and the names of its files.

    Only files whose names are known beforehand are fetched. Raises BadFile if there is no adapter or a file is too
    large, QhubError if they do not fit on the disk, Corrupt if they are not what the Hub lists.
    """
    commit, listed = _look(api, repo_id, revision)
    prefix = f"{subfolder}/" if subfolder else ""
    where = f"{repo_id}@{commit[:12]}" + (f", folder {subfolder}" if subfolder else "")
    everything = listed
    listed = {path.removeprefix(prefix): file for path, file in listed.items() if path.startswith(prefix)}
    _check_listing(listed, where, _elsewhere(everything, repo_id, prefix))
    _check_space(home, listed, where)
    fetched = [path for path in (CONFIG, MANIFEST, SIGNATURE, WEIGHTS) if path in listed]
    for path in fetched:
        api.hf_hub_download(repo_id, prefix + path, revision=commit, local_dir=folder)
        if prefix:
            (folder / prefix / path).rename(folder / path)
        _check_download(folder / path, listed[path], where)
    return commit, set(fetched)


@dataclass(frozen=True)
class Listed:
    """What the Hub says of a file: its size in bytes, and the sha256 of one that is in LFS."""

    size: int | None
    sha256: str | None


def _look(api: HfApi, repo_id: str, revision: str | None) -> tuple[str, dict[str, Listed]]:
    """The commit that `revision` is now, and the files at it."""
    info = api.model_info(repo_id, revision=revision, files_metadata=True)
    if not info.sha:
        raise HubError(f"the Hub does not say which commit of {repo_id} this is: name a revision")
    files = info.siblings or ()
    return info.sha, {file.rfilename: Listed(file.size, file.lfs.sha256 if file.lfs else None) for file in files}


def _elsewhere(listed: Mapping[str, Listed], repo_id: str, prefix: str) -> str:
    """Where in the repository adapters are, if not here, as a hint."""
    folders = sorted({path.removesuffix(f"/{WEIGHTS}") for path in listed if path.endswith(f"/{WEIGHTS}")})
    shown = [f"{repo_id}/{folder}" for folder in folders if folder.isprintable() and f"{folder}/" != prefix]
    if WEIGHTS in listed and prefix:
        shown.insert(0, repo_id)
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    return f". There are adapters at {', '.join(shown[:8])}{more}: name one of them" if shown else ""


def _check_listing(listed: Mapping[str, Listed], where: str, elsewhere: str) -> None:
    """Raise BadFile unless there is an adapter among the files; `elsewhere` says where there is one."""
    if WEIGHTS not in listed and PICKLED in listed:
        raise BadFile(
            f"{where} holds {PICKLED}, a pickle, which can run code when it is read. If you trust it, load it with "
            "PEFT and save it with model.save_pretrained(FOLDER), which writes safetensors; then "
            "`qhub add FOLDER --name NAME`"
        )
    if missing := [path for path in (WEIGHTS, CONFIG) if path not in listed]:
        raise BadFile(f"{where} is not a LoRA adapter: it has no {' and no '.join(missing)}{elsewhere}")
    for path in (CONFIG, MANIFEST, SIGNATURE):
        if path in listed and (size := listed[path].size or 0) > MAX_JSON_BYTES:
            raise BadFile(f"{path} of {where} has {size:,} bytes: no adapter needs that many")


def _check_space(home: Home, listed: Mapping[str, Listed], where: str) -> None:
    """Raise QhubError if the download and the copy in the registry do not fit on the disk."""
    needed = 2 * sum(listed[path].size or 0 for path in (CONFIG, MANIFEST, WEIGHTS) if path in listed)
    make_folder(home.root)
    free = shutil.disk_usage(home.root).free
    if needed > free:
        raise QhubError(
            f"{where} needs {needed / 1e9:,.1f} GB while it is pulled, {free / 1e9:,.1f} GB are free at {home.root}: "
            "nothing was downloaded, free some and try again"
        )


def _check_download(path: Path, listed: Listed, where: str) -> None:
    """Raise Corrupt if the file is not the one that the Hub listed: its own client does not look."""
    size = path.stat().st_size
    if listed.size not in (None, size):
        raise Corrupt(f"{path.name} of {where} came with {size:,} bytes, the Hub lists {listed.size:,}: pull again")
    if listed.sha256 and digest_file(path) != f"sha256:{listed.sha256}":
        raise Corrupt(f"{path.name} of {where} was damaged on the way (its sha256 is not the Hub's): pull again")
