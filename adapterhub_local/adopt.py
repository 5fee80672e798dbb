"""Take in an adapter made elsewhere: read strictly, check it against a base, write it self-describing."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.origin import Origin, belongs
from adapterhub_local.errors import Incompatible, InputError
from adapterhub_local.lora.adapter import AdapterFile, open_adapter
from adapterhub_local.lora.config import WEIGHTS
from adapterhub_local.lora.names import magnitude_name, rows_name
from adapterhub_local.lora.write import tensor_name, write_adapter
from adapterhub_local.registry import Registry, Version


def adopt(
    path: Path, name: str, registry: Registry, base: Mapping[str, Any], *, alpha: float | None = None,
    force: bool = False, confirmed: bool = False, alias: str | None = None, lineage: Mapping[str, Any] | None = None,
    staging_folder: Path, source: Path | None = None, info: BaseInfo | None = None,
) -> Version:  # fmt: skip
    """Register the adapter at `path` (PEFT folder or single file) as a version of `name` for `base`.

    `base` is the lineage entry of the base (name, fingerprint, hub_id, ...). The factors are kept as they
    are; with `info`, the base itself, they are held to its modules, and what equals its own tensors is left out, else
    that is the caller's to check. `source` is the file a person gave, where it was converted; `confirmed` says that a
    person named the base, which stands against another name in the file, not against another fingerprint. Raises
    Incompatible if the adapter says it was made for another base (unless `force`), and what `open_adapter` raises.
    """
    source = source or path
    left_out: tuple[str, ...] = ()
    known: Mapping[str, tuple[int, int]] = {}
    try:
        adapter = open_adapter(path, alpha=alpha, dora=True, copies=info is not None, tokens=True)
        origin = Origin.of_adapter(adapter)
        answer = belongs(origin, Origin.of_lineage(base), base["name"])
        by_name = answer.level == "other" and not origin.fingerprint
        if not answer and not force and not (by_name and confirmed):
            way = "name its base with --base, or " if not confirmed else ""
            raise Incompatible(f"{source} was {answer.reason}: {way}--force registers it anyway")
        if info is not None:
            from adapterhub_local.base.fit import fit  # with transformers, seconds of a start
            from adapterhub_local.base.shapes import linear_shapes

            known = linear_shapes(info)
            adapter, left_out = fit(adapter, info, known)
        files = rewrite(adapter, staging_folder, base.get("hub_id"), base["fingerprint"], known)
    except InputError as error:
        if source == path:
            raise
        # the folder of a converted file is gone when this is read
        raise type(error)(
            str(error).replace(f"{path}/{WEIGHTS}", str(source)).replace(str(path), str(source))
        ) from None
    is_confirmed = confirmed and answer.level in ("shapes", "other") and not (force and not by_name)
    full = {
        "kind": "add",
        "base": dict(base),
        "adapter": describe(adapter),
        "source": {"file": source.name, "base_model": origin.hub_id},
        # exact: trained on this very base; named: it names it; shapes: its modules are there, no more is known
        "compatibility": {
            "level": "shapes" if answer.level == "other" else answer.level,
            "base_fingerprint": adapter.base_fingerprint,
            "base_model": origin.hub_id,
            **({"confirmed": True} if is_confirmed else {}),
        },
        **({"left_out": list(left_out)} if left_out else {}),
        **({"forced": True} if force else {}),
        **(lineage or {}),
    }
    return registry.publish(name, files, full, alias=alias)


def rewrite(
    adapter: AdapterFile, folder: Path, hub_id: str | None, fingerprint: str | None, known: Iterable[str] = ()
) -> dict[str, Path | bytes]:
    """The adapter's two files with PEFT's names and its config in the header; factors unchanged, finite.

    `known` are the linear modules of the base, as far as they are known.
    """
    # dtypes are kept tensor by tensor, so shapes are taken from the factors themselves, read twice
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors_of(adapter)}
    config = replace(adapter.config, base_model=hub_id or adapter.config.hub_id)
    return write_adapter(folder, config, shapes, tensors_of(adapter), fingerprint, known=known)


def tensors_of(adapter: AdapterFile) -> Iterator[tuple[str, torch.Tensor]]:
    """PEFT's names and the tensors, finite, module by module: A, B, and with DoRA the lengths of the rows; then the
    adapter's own rows of embeddings."""
    for module, delta in adapter.deltas():
        yield tensor_name(module, "A"), delta.A
        yield tensor_name(module, "B"), delta.B
        if module in adapter.magnitudes:
            yield magnitude_name(module), adapter.magnitude(module)
    for module in adapter.tokens:
        yield rows_name(module), adapter.rows(module)


def describe(adapter: AdapterFile) -> dict[str, Any]:
    """An adapter's entry in a lineage."""
    config = adapter.config
    targets = config.target_modules if config.narrowing is None else tuple(sorted(adapter.modules))
    return {
        "rank": adapter.config.rank,
        **({"dora": True} if adapter.magnitudes else {}),
        **({"tokens": len(ids)} if (ids := adapter.token_ids) else {}),
        "alpha": adapter.config.alpha,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "num_modules": len(adapter.shapes),
        "num_parameters": adapter.num_parameters,
    }
