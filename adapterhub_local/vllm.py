"""vLLM answers with versions of the registry: a plugin that finds `name@3`, here or at a remote.

vLLM loads it by its entry point (`vllm.general_plugins`) and asks it for each model that it does not know. It keeps
what it was given for a name as long as it runs, and its prefix cache is by name as well, so only references that can
never mean anything else are resolved: an alias would stay what it was at its first request. vLLM's base is a 16-bit
model, where ours is its NF4 copy.

Nothing here imports torch; vLLM is imported where it is installed, by `register` alone.
"""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from adapterhub_local.base.bases import BaseInfo, find_base, list_bases
from adapterhub_local.base.origin import Origin, belongs
from adapterhub_local.errors import BadReference, Incompatible, NotFound, QhubError
from adapterhub_local.refs import Mix, Reference
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.kinds import check_adapter
from adapterhub_local.registry.pull import pull
from adapterhub_local.registry.remotes import Remote, remote_at
from adapterhub_local.registry.store import open_store
from adapterhub_local.settings import Home, home, vllm_base, vllm_remote

logger = logging.getLogger("vllm.qhub")  # vLLM shows the loggers below its own
WHOLE_DIGEST = len("sha256:") + 64


def register() -> None:
    """Have vLLM ask for adapters here; nothing where vLLM is not installed. vLLM calls it in each of its processes."""
    try:
        from vllm.lora.request import LoRARequest
        from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
    except ImportError:
        return

    class Resolver(LoRAResolver):  # type: ignore[misc]
        """The registry of this process's home, as vLLM asks it."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """See LoRAResolver. What is not found is logged with its reason: vLLM's answer has none."""
            try:
                version = await asyncio.to_thread(find, base_model_name, lora_name)
            except (QhubError, OSError) as error:
                logger.warning("vLLM's model %r is not an adapter of the registry: %s", lora_name, error)
                return None
            number = int(version.content_digest.removeprefix("sha256:")[:15], 16) + 1  # vLLM gives it one of its own
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(version.path))

    LoRAResolverRegistry.register_resolver("qhub", Resolver())


def find(model: str, name: str, place: Home | None = None) -> Version:
    """The version that `name` means to vLLM, which serves `model` (a folder or Hub id); fetched if a remote has it.

    Raises BadReference for what may come to mean another version, Incompatible for another base's adapter, a router,
    DoRA and rows of embeddings, NotFound, and what reading a remote raises.
    """
    place = place or home()
    return find_computed(Registry(place), fixed(name), base_for(model, place), vllm_remote())


def find_computed(registry: Registry, reference: Reference, base: BaseInfo, remote: Remote | str | None) -> Version:
    """The version that `reference` means, here or at `remote`, a name or URL, if it is for `base` and vLLM computes it.

    Raises what `find` raises of a reference.
    """
    try:
        version = registry.resolve(reference)
    except NotFound:
        if remote is None:
            raise
        there = remote if isinstance(remote, Remote) else remote_at(registry.home, remote)
        version = _fetched(registry, reference, there, base)
    check_origin(version, base)
    check_form(version)
    return version


def fixed(name: str) -> Reference:
    """The reference that `name` spells, if it can only ever mean one version. Raises BadReference."""
    mix = Mix.parse(name)
    if not mix.is_single:
        raise BadReference("a mix has no files that vLLM could load: merge it with `qhub merge` and name the version")
    reference = mix.terms[0][0]
    if reference.version is None and (reference.digest is None or len(reference.digest) != WHOLE_DIGEST):
        raise BadReference(
            "it may mean another version later, and vLLM would keep the one that it means now: write "
            f"{reference.name}@ and the number of a version, or its whole digest"
        )
    if str(reference) != name:
        raise BadReference(f"vLLM would keep it beside '{reference}', which is the same: write {reference}")
    return reference


def base_for(model: str, place: Home) -> BaseInfo:
    """The base whose adapters fit vLLM's model: the one named in the environment, or made of that model.

    Raises NotFound.
    """
    if (name := vllm_base()) is not None:
        return find_base(name, place)
    for base in list_bases(place):
        if model in (base.source, base.hub_id) or _is_same_folder(model, base.source):
            return base
    raise NotFound(
        f"no base in {place.root} was made of '{model}', which vLLM serves: set QHUB_VLLM_BASE to the base whose "
        "adapters it shall load, `qhub base list` shows them"
    )


def check_origin(version: Version, base: BaseInfo) -> None:
    """Raise Incompatible unless the version is an adapter that was made for `base`, by what its lineage says."""
    check_adapter(version)
    answer = belongs(Origin.of_version(version), base)
    if not answer:
        raise Incompatible(f"{version} was {answer.reason}")
    if answer.level == "shapes":  # what happens to have the same shapes would be answered with
        raise Incompatible(f"{version} does not say that it was made for base '{base.name}': {answer.reason}")


def check_form(version: Version) -> None:
    """Raise Incompatible for what vLLM does not compute."""
    config = json.loads((version.path / "adapter_config.json").read_text(encoding="utf-8"))
    for key, what in (("use_dora", "DoRA"), ("trainable_token_indices", "rows of the embeddings")):
        if config.get(key):
            raise Incompatible(f"{version} has {what}, which vLLM does not compute: `qhub serve` does")


def _fetched(registry: Registry, reference: Reference, remote: Remote, base: BaseInfo) -> Version:
    """The version that a remote has, brought here. Raises as `pull`; Incompatible if it has another number here."""
    pull(registry, open_store(remote), reference, accept=lambda version: check_origin(version, base))
    try:
        return registry.resolve(reference)
    except NotFound:
        raise Incompatible(
            f"{reference} of {remote.name} has another number in this home, which has versions of its own of "
            f"'{reference.name}': give vLLM a home of its own"
        ) from None


def _is_same_folder(one: str, other: str) -> bool:
    return Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other)
