"""One adapter of a merge: what names it, how it is opened, and what the result records of it."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adapterhub_local.base.origin import Origin
from adapterhub_local.durable import digest_file
from adapterhub_local.errors import InputError
from adapterhub_local.lora.adapter import AdapterFile, open_adapter
from adapterhub_local.lora.config import WEIGHTS
from adapterhub_local.lora.contents import read_layout
from adapterhub_local.lora.scale import AlphaKnown
from adapterhub_local.merge.align import without_copies
from adapterhub_local.merge.layers import Weight, mean
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.kinds import check_adapter

Opener = Callable[[Path, float | None], tuple[AdapterFile, dict[str, Any] | None]]


@dataclass(frozen=True)
class Parent:
    """One adapter of a merge: how it was named, its opened file, its weight, its version if it is registered."""

    label: str
    adapter: AdapterFile
    weight: Weight
    version: Version | None = None
    converted: Mapping[str, Any] | None = None  # from what, and with which loss; `adapter` is the converted one
    left_out: tuple[str, ...] = ()  # tensors of its file that are the base's own

    @property
    def base(self) -> dict[str, Any]:
        """What is known of its base."""
        if self.version is not None:
            return dict(self.version.lineage.get("base", {}))
        return {"fingerprint": self.adapter.base_fingerprint, "hub_id": self.adapter.config.hub_id}

    @property
    def name(self) -> str:
        """What people read: the version, or the name of the file without its folder."""
        return str(self.version) if self.version is not None else Path(self.label).name

    @cached_property
    def digest(self) -> str:
        """`sha256:<hex>` of the weights file, the same whether it is named as a file or as a version."""
        files = self.version.files if self.version is not None else ()
        known = next((file.digest for file in files if file.path == WEIGHTS), None)
        if known is None and self.converted is not None:
            path = Path(os.path.expanduser(self.label))
            return digest_file(path / WEIGHTS if path.is_dir() else path)
        return known or digest_file(self.adapter.path)

    def lineage(self) -> dict[str, Any]:
        """How the merged version names this parent; files by name and digest, not by path."""
        converted = {"converted": dict(self.converted)} if self.converted is not None else {}
        weights = {"weights": list(self.weight)} if isinstance(self.weight, tuple) else {}
        fields = {"weight": mean(self.weight), **weights, **converted}
        if self.version is None:
            return {"reference": self.name, "digest": self.digest, **fields}
        return {
            "reference": str(self.version),
            "manifest_digest": self.version.manifest_digest,
            "content_digest": self.version.content_digest,
            **fields,
            **({"pulled_from": origin} if (origin := self.version.lineage.get("pulled_from")) else {}),
        }


def is_path(label: str) -> bool:
    """Whether a label names a file or folder, rather than a version."""
    is_there = Path(os.path.expanduser(label)).exists()
    return is_there or label.endswith(".safetensors") or label.startswith((".", "/", "~"))


def open_parent(label: str, weight: Weight, registry: Registry, alpha: float | None, opener: Opener | None) -> Parent:
    """The adapter that a label names: a version, or a file or folder of this `alpha`. Raises what opening it raises."""
    version = None if is_path(label) else check_adapter(registry.resolve(label))
    path, given = (Path(os.path.expanduser(label)), alpha) if version is None else (version.path, None)
    left_out: tuple[str, ...] = ()
    try:
        if opener is not None:
            adapter, converted = opener(path, given)
        else:
            adapter, converted = open_adapter(path, alpha=given, copies=True, tokens=True), None
            adapter, left_out = without_copies(adapter, Origin.of_adapter(adapter), registry)
    except InputError as error:
        if version is None:
            raise
        raise type(error)(str(error).replace(str(path), label)) from None  # nobody knows the folders of versions
    return Parent(label, adapter, weight, version, converted, left_out)


def needed_alphas(labels: Sequence[str], alphas: Sequence[float | None], registry: Registry) -> list[float | None]:
    """The alpha for each label: one that is given for all is for those only that do not say theirs.

    Raises AlphaKnown if all of them say another.
    """
    if len(labels) < 2 or alphas[0] is None or len(set(alphas)) > 1:
        return list(alphas)
    needed: list[float | None] = []
    refused = None
    for label, one in zip(labels, alphas, strict=True):
        try:
            if is_path(label):
                read_layout(Path(os.path.expanduser(label)), alpha=one, dora=True, copies=True, tokens=True)
            needed.append(one)
        except AlphaKnown as error:
            refused = error
            needed.append(None)
    if refused is not None and all(
        one is None or not is_path(label) for label, one in zip(labels, needed, strict=True)
    ):
        raise refused
    return needed
