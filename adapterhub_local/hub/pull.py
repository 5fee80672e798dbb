"""`pull`: an adapter from the Hub becomes a version of the registry, checked before it is registered.

A repository that `qhub push` made comes back as it was; one made with PEFT is rewritten into our form.
Only file names known beforehand are downloaded, into a staging folder that never stays.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from adapterhub_local.base.store import BaseInfo, list_bases
from adapterhub_local.durable import digest_bytes, digest_file, staging
from adapterhub_local.errors import BadFile, BadReference, Corrupt, HubError
from adapterhub_local.hub.client import check_repo_id, connect, hub_errors, is_model_id
from adapterhub_local.hub.package import MANIFEST, unpack
from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.refs import check_name
from adapterhub_local.registry import File, Registry, Version
from adapterhub_local.registry.version import content_digest
from adapterhub_local.settings import Home

if TYPE_CHECKING:
    from adapterhub_local.lora.adapter import AdapterFile

PICKLED = "adapter_model.bin"
MAX_JSON_BYTES = 16 << 20


@dataclass(frozen=True)
class PullResult:
    """A pulled version and where it came from.

    `is_new` is False if the registry had it already; `base` is the name of its base in this home, None if it
    is not there; `is_verified` if a manifest of qhub vouched for every byte.
    """

    version: Version
    repo_id: str
    commit: str
    is_new: bool
    is_verified: bool
    base: str | None

    @property
    def base_known(self) -> bool:
        return self.base is not None


def pull(
    registry: Registry,
    repo_id: str,
    *,
    revision: str | None = None,
    name: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> PullResult:
    """Register the adapter in `repo_id` at `revision` (branch, tag or commit; default `main`) as `name`'s next version.

    `name` defaults to the repository's own. Raises NotFound, HubError, BadReference for a name that cannot be
    used, Corrupt if bytes are not what the manifest says, BadFile for what is no adapter or is not supported;
    then nothing is registered.
    """
    name = _name(name, check_repo_id(repo_id))
    api = connect(endpoint, token)
    with staging(registry.home.tmp) as folder:
        fetched = folder / "fetched"
        with hub_errors(repo_id, revision, endpoint=api.endpoint):
            commit, sizes = _look(api, repo_id, revision)
            where = f"{repo_id}@{commit[:12]}"
            _check_listing(sizes, where)
            for path in (path for path in (CONFIG, MANIFEST, WEIGHTS) if path in sizes):
                api.hf_hub_download(repo_id, path, revision=commit, local_dir=fetched)
        origin: dict[str, Any] = {"repo_id": repo_id, "commit": commit}
        files: Mapping[str, Path | bytes]
        lineage: Mapping[str, Any]
        if is_verified := MANIFEST in sizes:
            unpacked = unpack(fetched, where)
            (fetched / CONFIG).write_bytes(unpacked.config)  # as the registry will have it, so this is what is checked
            _check_adapter(fetched, unpacked.lineage, where)
            origin["manifest_digest"] = unpacked.manifest_digest
            files = {WEIGHTS: fetched / WEIGHTS, CONFIG: unpacked.config}
            lineage = unpacked.lineage
            base = _base_of(registry.home, lineage)
        else:
            adapter = _check_adapter(fetched, {}, where)
            files, lineage = _converted(adapter, folder / "converted")
            if base := _base_of(registry.home, lineage):
                lineage = {**lineage, "base": {**base.lineage(), "matched_by": "hub_id"}}
        version = _registered(registry, name, files, origin)
        is_new = version is None
        if version is None:
            version = registry.publish(name, files, {**lineage, "pulled_from": origin})
    return PullResult(version, repo_id, commit, is_new, is_verified, base.name if base else None)


def _name(name: str | None, repo_id: str) -> str:
    if name is not None:
        return check_name(name)
    try:
        return check_name(repo_id.partition("/")[2].lower())
    except BadReference:
        raise BadReference(f"'{repo_id.partition('/')[2]}' cannot name an adapter here: give --name NAME") from None


def _look(api: HfApi, repo_id: str, revision: str | None) -> tuple[str, dict[str, int | None]]:
    """The commit that `revision` is now, and the files at it: path -> size in bytes."""
    info = api.model_info(repo_id, revision=revision, files_metadata=True)
    if not info.sha:
        raise HubError(f"the Hub does not say which commit of {repo_id} this is: name a revision")
    return info.sha, {file.rfilename: file.size for file in info.siblings or ()}


def _check_listing(sizes: Mapping[str, int | None], where: str) -> None:
    """Raise BadFile unless there is an adapter among the files."""
    if WEIGHTS not in sizes and PICKLED in sizes:
        raise BadFile(
            f"{where} holds {PICKLED}, a pickle, which can run code when it is read. If you trust it, load it with "
            "PEFT and save it with model.save_pretrained(FOLDER), which writes safetensors; then `qhub add NAME FOLDER`"
        )
    if missing := [path for path in (WEIGHTS, CONFIG) if path not in sizes]:
        raise BadFile(f"{where} is not a LoRA adapter: it has no {' and no '.join(missing)}")
    for path in (CONFIG, MANIFEST):
        if (sizes.get(path) or 0) > MAX_JSON_BYTES:
            raise BadFile(f"{path} of {where} has {sizes[path]:,} bytes: no adapter needs that many")


def _check_adapter(folder: Path, lineage: Mapping[str, Any], where: str) -> "AdapterFile":
    """Open the adapter strictly and read every tensor once. Raises BadFile, or Corrupt if its base is another."""
    from adapterhub_local.lora.adapter import open_adapter  # loads torch

    try:
        adapter = open_adapter(folder)
        for _ in adapter.deltas():  # refuses NaN and infinity
            pass
    except BadFile as error:
        raise BadFile(str(error).replace(str(folder), where)) from None  # the folder is gone when this is read
    said = lineage.get("base", {}).get("fingerprint")
    if said and adapter.base_fingerprint and said != adapter.base_fingerprint:
        raise Corrupt(f"{WEIGHTS} of {where} is for another base than its {MANIFEST} says: nothing was registered")
    return adapter


def _converted(adapter: "AdapterFile", folder: Path) -> tuple[Mapping[str, Path | bytes], dict[str, Any]]:
    """A plain PEFT adapter in our self-describing form, and what is known of where it came from."""
    from adapterhub_local.lora.header import read_header
    from adapterhub_local.lora.write import DTYPE_NAMES, tensor_name, write_adapter

    dtypes = {spelled: dtype for dtype, spelled in DTYPE_NAMES.items()}
    entries = read_header(adapter.path).tensors
    shapes = {}
    for module in adapter.modules:
        for factor in "AB":
            entry = entries[adapter.keys[module, factor]]
            shapes[tensor_name(module, factor)] = (dtypes[entry.dtype], entry.shape)
    tensors = (
        (tensor_name(module, factor), tensor)
        for module, delta in adapter.deltas()
        for factor, tensor in (("A", delta.A), ("B", delta.B))
    )
    config = adapter.config
    base_id = config.base_model if is_model_id(config.base_model) else None  # a path of someone's machine is dropped
    folder.mkdir()
    files = write_adapter(folder, replace(config, base_model=base_id), shapes, tensors, None)
    targets = config.target_modules
    lineage = {
        "kind": "pull",
        "base": {"hub_id": base_id},
        "adapter": {
            "rank": config.rank,
            "alpha": config.alpha,
            "target_modules": targets if isinstance(targets, str) else list(targets),
            "num_parameters": adapter.num_parameters,
        },
    }
    return files, lineage


def _base_of(home: Home, lineage: Mapping[str, Any]) -> BaseInfo | None:
    """The base of this home the adapter was made for: by fingerprint, or by Hub id where only that is known."""
    wanted = lineage.get("base", {})
    key = "fingerprint" if wanted.get("fingerprint") else "hub_id"
    if not wanted.get(key):
        return None
    return next((base for base in list_bases(home) if getattr(base, key) == wanted[key]), None)


def _registered(
    registry: Registry, name: str, files: Mapping[str, Path | bytes], origin: Mapping[str, Any]
) -> Version | None:
    """The version of `name` that is this very one: pushed from here, or pulled before. Its bytes are checked."""
    described = (
        File(path, digest_bytes(source), len(source))
        if isinstance(source, bytes)
        else File(path, digest_file(source), source.stat().st_size)
        for path, source in sorted(files.items())
    )
    content = content_digest(tuple(described))
    for version in registry.versions(name):
        before = version.lineage.get("pulled_from", {})
        same_commit = (before.get("repo_id"), before.get("commit")) == (origin["repo_id"], origin["commit"])
        same_manifest = "manifest_digest" in origin and origin["manifest_digest"] in (
            version.manifest_digest,
            before.get("manifest_digest"),
        )
        if version.content_digest == content and (same_commit or same_manifest):
            registry.folder(version)
            return version
    return None
