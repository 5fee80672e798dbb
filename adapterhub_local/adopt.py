"""Take in an adapter made elsewhere: read strictly, check it against a base, write it self-describing."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.errors import Incompatible
from adapterhub_local.lora.adapter import AdapterFile, open_adapter
from adapterhub_local.lora.contents import magnitude_name
from adapterhub_local.lora.write import tensor_name, write_adapter
from adapterhub_local.registry import Registry, Version


def adopt(
    path: Path, name: str, registry: Registry, base: Mapping[str, Any], *, alpha: float | None = None,
    force: bool = False, alias: str | None = None, lineage: Mapping[str, Any] | None = None, staging_folder: Path,
    source: Path | None = None,
) -> Version:  # fmt: skip
    """Register the adapter at `path` (PEFT folder or single file) as a version of `name` for `base`.

    `base` is the lineage entry of the base (name, fingerprint, hub_id, ...). The factors are kept as they
    are; that they have the shapes of the base is the caller's to check. `source` is the file a person gave, where
    it was converted. Raises Incompatible if the adapter says it was made for another base (unless `force`), and
    what `open_adapter` raises.
    """
    source = source or path
    adapter = open_adapter(path, alpha=alpha, dora=True)
    if adapter.base_fingerprint and adapter.base_fingerprint != base["fingerprint"] and not force:
        raise Incompatible(
            f"{source} was made for another base ({adapter.base_fingerprint[:19]}), not for {base['name']} "
            f"({base['fingerprint'][:19]}): name its base with --base, or --force registers it anyway"
        )
    said, known = adapter.config.hub_id, base.get("hub_id")
    if not adapter.base_fingerprint and said and known and said != known and not force:
        raise Incompatible(
            f"{source} was made for {said}, not for {base['name']} ({known}): name its base with --base, "
            "or --force registers it anyway"
        )
    is_exact = adapter.base_fingerprint == base["fingerprint"]
    files = rewrite(adapter, staging_folder, base.get("hub_id"), base["fingerprint"])
    full = {
        "kind": "add",
        "base": dict(base),
        "adapter": describe(adapter),
        "source": {"file": source.name, "base_model": adapter.config.hub_id},
        # exact: trained on this very base; shapes: every module has its shape there, no more is known
        "compatibility": {
            "level": "exact" if is_exact else "shapes",
            "base_fingerprint": adapter.base_fingerprint,
            "base_model": said,
        },
        **({"forced": True} if force else {}),
        **(lineage or {}),
    }
    return registry.publish(name, files, full, alias=alias)


def rewrite(adapter: AdapterFile, folder: Path, hub_id: str | None, fingerprint: str | None) -> dict[str, Path | bytes]:
    """The adapter's two files with PEFT's names and its config in the header; factors unchanged, finite."""
    # dtypes are kept tensor by tensor, so shapes are taken from the factors themselves, read twice
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors_of(adapter)}
    config = replace(adapter.config, base_model=hub_id or adapter.config.hub_id)
    return write_adapter(folder, config, shapes, tensors_of(adapter), fingerprint)


def tensors_of(adapter: AdapterFile) -> Iterator[tuple[str, torch.Tensor]]:
    """PEFT's names and the tensors, finite, module by module: A, B, and with DoRA the lengths of the rows."""
    for module, delta in adapter.deltas():
        yield tensor_name(module, "A"), delta.A
        yield tensor_name(module, "B"), delta.B
        if module in adapter.magnitudes:
            yield magnitude_name(module), adapter.magnitude(module)


def describe(adapter: AdapterFile) -> dict[str, Any]:
    """An adapter's entry in a lineage."""
    targets = adapter.config.target_modules
    return {
        "rank": adapter.config.rank,
        **({"dora": True} if adapter.magnitudes else {}),
        "alpha": adapter.config.alpha,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "num_modules": len(adapter.shapes),
        "num_parameters": adapter.num_parameters,
    }
