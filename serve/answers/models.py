"""What the field `model` may name: the base, or any reference to a version that was made for it."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.errors import BadReference, NotFound
from adapterhub_local.refs import Mix, Reference, check_name
from adapterhub_local.registry import Registry, Version
from serve.adapters.mixture import Mixture, mixture
from serve.errors import ModelNotFound


@dataclass(frozen=True)
class Target:
    """What a request is answered by: the base, with a version or bare."""

    model: str  # as it was asked for
    base: BaseInfo
    version: Version | Mixture | None

    @property
    def fingerprint(self) -> str:
        """The base, and the adapter's content, in short: equal fingerprints, equal weights."""
        digest = f"-{_short(self.version.content_digest)}" if self.version else ""
        return f"fp_{_short(self.base.fingerprint)}{digest}"

    @property
    def adapter(self) -> dict[str, Any] | None:
        """Exactly which version answers, or which in what proportions."""
        match self.version:
            case Version() as version:
                return _identity(version)
            case Mixture() as mix:
                terms = [{**_identity(version), "weight": weight} for version, weight in mix.terms]
                return {"name": mix.name, "digest": mix.content_digest, "mix": terms}
        return None

    @property
    def versions(self) -> list[Version]:
        """The versions of the registry that answer: one, or those of a mix; none that was loaded from a folder."""
        match self.version:
            case Version() as version:
                found = [version]
            case Mixture() as mix:
                found = [version for version, _ in mix.terms]
            case _:
                found = []
        return [version for version in found if version.lineage.get("kind") != "load"]


def is_name(text: str) -> bool:
    """Whether `text` is an adapter's name and nothing else."""
    try:
        return bool(check_name(text))
    except BadReference:
        return False


def find_target(model: str, base: BaseInfo, registry: Registry) -> Target:
    """What `model` names now: aliases and new versions count from this moment.

    The base's name, `reference`, `base:reference`, or a mix instead of the reference. Raises ModelNotFound;
    BadParameter for a mix of too many.
    """
    if model == base.name:
        return Target(model, base, None)
    try:
        mix = Mix.parse(model.removeprefix(f"{base.name}:"))
        return Target(model, base, mixture([(registry.resolve(reference), weight) for reference, weight in mix.terms]))
    except (BadReference, NotFound) as error:
        if rest := _behind_a_base(model):
            message = f"the base that is served here is '{base.name}': ask for '{rest}', or '{base.name}:{rest}'"
            raise ModelNotFound(message) from None
        raise ModelNotFound(f"{error} (served are base '{base.name}' and its adapters, see /v1/models)") from None


def _behind_a_base(model: str) -> Mix | None:
    """What `model` asks of a base by its name, if that is how it is spelled."""
    try:
        return Mix.parse(model.partition(":")[2])
    except BadReference:
        return None


def list_models(base: BaseInfo, registry: Registry) -> list[dict[str, Any]]:
    """The base and every name, version and alias of the adapters made for it, as OpenAI lists models.

    `root` is the content that answers (a digest), `parent` the base it is added to.
    """
    models = [model_entry(base.name, base.created_at, base.fingerprint, None)]
    versions = registry.versions_on_base(base.fingerprint)
    for name in sorted({version.name for version in versions}):
        own = {version.number: version for version in versions if version.name == name}
        newest = registry.resolve(Reference(name)).number
        spellings = {name: newest, **{f"{name}@{number}": number for number in own}}
        spellings |= {f"{name}@{alias}": number for alias, number in registry.aliases(name).items()}
        models += [
            model_entry(spelling, own[number].created_at, own[number].content_digest, base.name)
            for spelling, number in spellings.items()
            if number in own
        ]
    return models


def model_entry(name: str, created_at: str, root: str, parent: str | None) -> dict[str, Any]:
    """A model as OpenAI lists it, with vLLM's `root` and `parent`."""
    created = int(datetime.fromisoformat(created_at).timestamp())
    return {"id": name, "object": "model", "created": created, "owned_by": "qhub", "root": root, "parent": parent}


def _identity(version: Version) -> dict[str, Any]:
    return {"name": version.name, "version": version.number, "digest": version.content_digest}


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]
