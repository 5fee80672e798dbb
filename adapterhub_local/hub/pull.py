"""`pull`: an adapter from the Hub becomes a version of the registry, checked before it is registered.

A repository that `qhub push` made comes back as it was; one made with PEFT is rewritten into our form.
Files are downloaded into a staging folder that never stays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_local.base.bases import find_base
from adapterhub_local.durable import digest_bytes, digest_file, staging
from adapterhub_local.errors import BadFile, BadReference, Corrupt, Incompatible
from adapterhub_local.hub.address import Address
from adapterhub_local.hub.client import check_repo_id, connect, hub_errors
from adapterhub_local.hub.download import download
from adapterhub_local.hub.foreign import base_id, base_revision, converted, fitted
from adapterhub_local.hub.match import FORCED, Match, match_base
from adapterhub_local.hub.package import MANIFEST, unpack
from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.refs import check_name
from adapterhub_local.registry import File, Registry, Version
from adapterhub_local.registry.signature import SIGNATURE, check, keep, signature_of
from adapterhub_local.registry.version import content_digest
from adapterhub_local.settings import Home, trusted_keys

if TYPE_CHECKING:
    from adapterhub_local.lora.adapter import AdapterFile

_POLICY = "nothing was registered, as only what is signed with a trusted key may be (QHUB_TRUSTED_KEYS)"


@dataclass(frozen=True)
class PullResult:
    """A pulled version and where it came from.

    `is_new` is False if the registry had it already; `base` is the name of its base in this home, None if it
    is not there, `matched_by` how it was recognised, `fitting` the bases that would fit by their shapes; `is_verified`
    if a manifest of qhub vouched for every byte.
    """

    version: Version
    repo_id: str
    commit: str
    is_new: bool
    is_verified: bool
    base: str | None
    matched_by: str | None = None
    fitting: tuple[str, ...] = ()

    @property
    def base_known(self) -> bool:
        return self.base is not None


def pull(
    registry: Registry,
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    name: str | None = None,
    base: str | None = None,
    force: bool = False,
    trusted: Sequence[Path] | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> PullResult:
    """Register the adapter in `repo_id` at `revision` (branch, tag or commit; default `main`) as `name`'s next version.

    `repo_id` may be an address copied from the Hub, and have the adapter's folder behind it, or in `subfolder`.
    `name` defaults to the repository's own. `base` names the base of this home it is for, where neither
    fingerprint nor Hub id decides; with `force` against the fingerprint that it was made for. With `trusted` (default:
    QHUB_TRUSTED_KEYS) it must be signed with one of these public keys. Raises NotFound, HubError, BadReference for a
    name that cannot be used, Corrupt
    if bytes are not what the manifest or the Hub says, BadFile for what is not an adapter or is not supported,
    Incompatible for a base that does not fit; then nothing is registered.
    """
    address = Address.parse(repo_id)
    repo_id, revision = check_repo_id(address.repo_id), revision or address.revision
    subfolder = subfolder or address.subfolder
    name = _name(name, repo_id)
    keys = trusted_keys() if trusted is None else tuple(trusted)
    if base is not None:
        find_base(base, registry.home)  # refused before anything is downloaded
    api = connect(endpoint, token)
    with staging(registry.home.tmp) as folder:
        fetched = folder / "fetched"
        with hub_errors(repo_id, revision, endpoint=api.endpoint):
            commit, names = download(api, repo_id, revision, fetched, registry.home, subfolder)
        where = f"{repo_id}@{commit[:12]}" + (f", folder {subfolder}" if subfolder else "")
        origin: dict[str, Any] = {"repo_id": repo_id, "commit": commit, "weights": digest_file(fetched / WEIGHTS)}
        origin |= {"subfolder": subfolder} if subfolder else {}
        files: Mapping[str, Path | bytes]
        lineage: Mapping[str, Any]
        if is_verified := MANIFEST in names:
            unpacked = unpack(fetched, where)
            (fetched / CONFIG).write_bytes(unpacked.config)  # as the registry will have it, so this is what is checked
            adapter = _check_adapter(fetched, unpacked.lineage, where)
            origin["manifest_digest"] = unpacked.manifest_digest
            files = {WEIGHTS: fetched / WEIGHTS, CONFIG: unpacked.config}
            lineage = unpacked.lineage
            signature = (fetched / SIGNATURE).read_bytes() if SIGNATURE in names else None
            if keys:
                _check_signature(fetched, folder / "signed", signature, keys, where)
            match = _matched(registry.home, lineage, adapter, base, where, force)
        else:
            if keys:
                raise Corrupt(f"{where} was not pushed by qhub, so no signature vouches for it: {_POLICY}")
            adapter, signature = _check_adapter(fetched, {}, where), None
            revision = base_revision(fetched / CONFIG)
            stated = {"base": {"hub_id": base_id(adapter), "revision": revision}}
            match = _matched(registry.home, stated, adapter, base, where, force)
            adapter, left_out = fitted(adapter, match.base, where)
            files, lineage = converted(adapter, folder / "converted", revision, match.base)
            lineage |= {"left_out": list(left_out)} if left_out else {}
        if match.base and match.base.fingerprint != (before := lineage.get("base") or {}).get("fingerprint"):
            if is_verified:  # the header of its weights names the base it was made for
                files, _ = converted(adapter, folder / "converted", None, match.base)
                lineage = {**lineage, "base_before": before}
            lineage = {**lineage, "base": {**match.base.lineage(), "matched_by": match.by}}
            lineage |= {"forced": True} if match.by == FORCED else {}
        version = _registered(registry, name, files, origin, (lineage.get("base") or {}).get("fingerprint"))
        is_new = version is None
        if version is None:
            version = registry.publish(name, files, {**lineage, "pulled_from": origin})
        if signature is not None and signature_of(registry, version) is None and "base_before" not in lineage:
            keep(registry.home, version.content_digest, signature)
    named = match.base.name if match.base else None
    return PullResult(version, repo_id, commit, is_new, is_verified, named, match.by, match.fitting)


def _name(name: str | None, repo_id: str) -> str:
    if name is not None:
        return check_name(name)
    try:
        return check_name(repo_id.partition("/")[2].lower())
    except BadReference:
        raise BadReference(f"'{repo_id.partition('/')[2]}' cannot name an adapter here: give --name NAME") from None


def _check_signature(fetched: Path, folder: Path, signature: bytes | None, keys: tuple[Path, ...], where: str) -> None:
    """Raise Corrupt unless the version's two files, as the registry will have them, are signed with a trusted key."""
    if signature is None:
        raise Corrupt(f"{where} is not signed: {_POLICY}")
    folder.mkdir()
    for path in (WEIGHTS, CONFIG):
        (folder / path).hardlink_to(fetched / path)
    check(folder, signature, keys, where, folder.parent)


def _check_adapter(folder: Path, lineage: Mapping[str, Any], where: str) -> "AdapterFile":
    """Open the adapter strictly and read every tensor once. Raises BadFile, or Corrupt if its base is another."""
    from adapterhub_local.adopt import tensors_of
    from adapterhub_local.lora.adapter import open_adapter  # loads torch

    try:
        adapter = open_adapter(folder, dora=True, copies=not lineage, tokens=True)
        for _ in tensors_of(adapter):  # refuses NaN and infinity
            pass
    except BadFile as error:
        raise BadFile(str(error).replace(str(folder), where)) from None  # the folder is gone when this is read
    stated = lineage.get("base", {}).get("fingerprint")
    if stated and adapter.base_fingerprint and stated != adapter.base_fingerprint:
        raise Corrupt(f"{WEIGHTS} of {where} is for another base than its {MANIFEST} says: nothing was registered")
    return adapter


def _matched(
    home: Home, lineage: Mapping[str, Any], adapter: "AdapterFile", chosen: str | None, where: str, force: bool
) -> Match:
    try:
        return match_base(home, lineage.get("base") or {}, adapter, chosen, force=force)
    except (Incompatible, BadFile) as error:
        raise type(error)(str(error).replace(str(adapter.path), where)) from None


def _registered(
    registry: Registry,
    name: str,
    files: Mapping[str, Path | bytes],
    origin: Mapping[str, Any],
    fingerprint: str | None,
) -> Version | None:
    """The version of `name` that is this very one, on this base: pushed from here, or pulled before.

    Its bytes are checked.
    """
    described = (
        File(path, digest_bytes(source), len(source))
        if isinstance(source, bytes)
        else File(path, digest_file(source), source.stat().st_size)
        for path, source in sorted(files.items())
    )
    content = content_digest(tuple(described))
    for version in registry.versions(name):
        before = version.lineage.get("pulled_from", {})
        same_commit = all(before.get(key) == origin.get(key) for key in ("repo_id", "commit", "subfolder"))
        same_manifest = "manifest_digest" in origin and origin["manifest_digest"] in (
            version.manifest_digest,
            before.get("manifest_digest"),
        )
        same_base = version.base_fingerprint == fingerprint
        if version.content_digest == content and same_base and (same_commit or same_manifest):
            registry.folder(version)
            return version
    return None
