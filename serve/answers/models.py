"""What the field `model` may name: the base, or any reference to a version that was made for it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.chat_settings import ChatSettings
from adapterhub_local.errors import Incompatible, InputError, NotFound
from adapterhub_local.refs import Reference
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.kinds import check_adapter, is_router
from adapterhub_local.registry.split import split_of
from serve.adapters.mixture import Mixture, label_of, mixture
from serve.adapters.record import AdapterStatus, Label
from serve.adapters.source import Source
from serve.errors import BadParameter, ModelNotFound
from serve.requests.found import Routed
from serve.requests.model_ref import ModelRef


@dataclass(frozen=True)
class Target:
    """What a request is answered by: the base, with a version or bare."""

    model: str  # as it was asked for
    base: BaseInfo
    version: Source | Mixture | None
    routed: Routed | None = None  # if a router chose it

    @property
    def fingerprint(self) -> str:
        """The base, and the adapter's content, in short: equal fingerprints, equal weights."""
        digest = f"-{_short(self.version.content_digest)}" if self.version else ""
        return f"fp_{_short(self.base.fingerprint)}{digest}"

    @property
    def label(self) -> Label:
        """What counts are kept by: the base, or the adapters without versions and weights."""
        if self.version is None:
            return Label(self.base.name, (self.base.name,))
        return Label(self.version.name, label_of(self.version).names)

    @property
    def chat_settings(self) -> ChatSettings:
        """How it was trained to be spoken to; that of the base for a mix whose parts differ. Raises BadParameter."""
        match self.version:
            case Version() as version:
                parts = [version]
            case Mixture() as mix:
                parts = [source for source, _ in mix.terms if isinstance(source, Version)]
            case _:
                parts = []
        try:
            found = [ChatSettings.of_lineage(version.lineage) for version in parts]
        except InputError as error:
            raise BadParameter(f"'{self.model}' cannot be asked with messages: {error}", "messages") from None
        return found[0] if found and all(each == found[0] for each in found) else ChatSettings()

    @property
    def adapter(self) -> dict[str, Any] | None:
        """Exactly which version answers, or which in what proportions."""
        if self.version is None:
            return None
        if not isinstance(self.version, Mixture):
            return _identity(self.version)
        terms = [{**_identity(source), "weight": weight} for source, weight in self.version.terms]
        return {"name": self.version.name, "digest": self.version.content_digest, "mix": terms}


def find_target(ref: ModelRef, base: BaseInfo, registry: Registry, folder: Source | None = None) -> Target:
    """What a request asks for now: aliases and new versions count from this moment; `folder` is held by its name.

    Raises ModelNotFound; BadParameter for a mix of too many.
    """
    if ref.mix is None or folder is not None:
        return Target(ref.text, base, folder)
    try:
        found = mixture([(check_adapter(registry.resolve(each)), weight) for each, weight in ref.mix.terms])
    except Incompatible as error:
        raise BadParameter(str(error), "model") from None
    except NotFound as error:
        raise ModelNotFound(f"{error} (served are base '{base.name}' and its adapters, see /v1/models)") from None
    return Target(ref.text, base, found)


def list_models(
    base: BaseInfo, registry: Registry, allows: Callable[[str], bool], router: Version | None = None
) -> list[dict[str, Any]]:
    """The base and every name, version and alias of the adapters made for it, as OpenAI lists models.

    Of names that are allowed; `root` is the content that answers (a digest), `parent` the base it is added to. With a
    router there is `auto`.
    """
    models = [model_entry(base.name, base.created_at, base.fingerprint, None)] if allows(base.name) else []
    if router is not None:
        models.append(model_entry("auto", router.created_at, router.content_digest, base.name))
    versions = [version for version in registry.versions_on_base(base.fingerprint) if not is_router(version.lineage)]
    for name in sorted({version.name for version in versions if allows(version.name)}):
        own = {version.number: version for version in versions if version.name == name}
        models += [
            model_entry(spelling, own[number].created_at, own[number].content_digest, base.name)
            for spelling, number in spellings(registry, name, own).items()
            if number in own
        ]
    return models


def spellings(registry: Registry, name: str, numbers: Iterable[int]) -> dict[str, int]:
    """All that clients may write for these versions of a name, and the version that each stands for now."""
    newest = registry.resolve(Reference(name)).number
    found = {name: newest, **{f"{name}@{number}": number for number in numbers}}
    return found | {f"{name}@{alias}": number for alias, number in registry.aliases(name).items()}


def residents(
    registry: Registry, held: Iterable[AdapterStatus], folders: Mapping[str, str]
) -> Iterator[tuple[str, AdapterStatus]]:
    """What of `held` is in memory, under every name by which clients may ask for it; `folders`: name -> digest.

    A name whose traffic is split stands for any of its sides. What no name stands for, such as a mix, is shown as it
    was asked for.
    """
    by_digest = {status.digest: status for status in held if status.num_bytes}
    meant = {name: [digest] for name, digest in folders.items()}
    for name in sorted({name for status in by_digest.values() for name in status.label.names}):
        own = {version.number: version.content_digest for version in registry.versions(name)}
        if not own:
            continue
        known = spellings(registry, name, own)
        meant |= {spelling: [own[number]] for spelling, number in known.items() if number in own}
        if split := split_of(registry, name):
            meant[name] = [digest for alias, _ in split for digest in meant.get(f"{name}@{alias}", ())]
    found = {name: next((each for each in digests if each in by_digest), None) for name, digests in meant.items()}
    yield from ((name, by_digest[digest]) for name, digest in found.items() if digest is not None)
    named = {digest for digests in meant.values() for digest in digests}
    yield from ((status.label.text, status) for digest, status in by_digest.items() if digest not in named)


def model_entry(name: str, created_at: str, root: str, parent: str | None) -> dict[str, Any]:
    """A model as OpenAI lists it, with vLLM's `root` and `parent`."""
    created = int(datetime.fromisoformat(created_at).timestamp())
    return {"id": name, "object": "model", "created": created, "owned_by": "qhub", "root": root, "parent": parent}


def adapter_entry(status: AdapterStatus) -> dict[str, Any]:
    """An adapter as /v1/adapters lists it."""
    return {
        "digest": status.digest,
        "name": status.label.text or None,
        "state": status.state.value,
        "in_slot": status.in_slot,
        "is_held": status.is_held,
        "is_pinned": status.is_pinned,
        "bytes": status.num_bytes,
        "requests_now": status.num_running,
        "requests": status.num_requests,
        "last_used": status.last_used,
    }


def _identity(version: Source) -> dict[str, Any]:
    return {"name": version.name, "version": version.number, "digest": version.content_digest}


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]
