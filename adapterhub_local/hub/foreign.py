"""An adapter of the Hub that qhub did not push: fitted to its base, and written in our form."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.modules import linear_modules
from adapterhub_local.errors import BadFile, InputError
from adapterhub_local.hub.client import is_model_id

if TYPE_CHECKING:
    from adapterhub_local.lora.adapter import AdapterFile


def base_revision(config: Path) -> str | None:
    """The revision of the base that PEFT recorded."""
    revision = json.loads(config.read_bytes()).get("revision")
    return revision if isinstance(revision, str) and revision else None


def base_id(adapter: "AdapterFile") -> str | None:
    """The id on the Hub that the config names as its base, perhaps an old one of one word; a path is dropped."""
    named = adapter.config.base_model
    one_word = named if named and "/" not in named and is_model_id(named) else None
    return adapter.config.hub_id or one_word


def fitted(adapter: "AdapterFile", base: "BaseInfo | None", where: str) -> tuple["AdapterFile", tuple[str, ...]]:
    """The adapter with its base's names, and what was left out as the base's own.

    Raises BadFile for more than factors where there is no base to compare it with.
    """
    if base is None:
        if adapter.copies:
            raise BadFile(
                f"{where}: {min(adapter.copies)!r} is not a LoRA factor of a linear layer. If it is its base's own "
                "weight, saved along, it is left out once that base is here: `qhub base add` it, then give --base"
            )
        return adapter, ()
    from adapterhub_local.base.fit import fit  # with transformers

    try:
        return fit(adapter, base)
    except InputError as error:
        raise type(error)(str(error).replace(str(adapter.path), where)) from None


def converted(
    adapter: "AdapterFile", folder: Path, revision: str | None, base: "BaseInfo | None"
) -> tuple[Mapping[str, Path | bytes], dict[str, Any]]:
    """A plain PEFT adapter in our self-describing form, and what is known of where it came from."""
    from adapterhub_local.adopt import tensors_of
    from adapterhub_local.lora.header import read_header
    from adapterhub_local.lora.names import magnitude_name, rows_name
    from adapterhub_local.lora.write import DTYPE_NAMES, tensor_name, write_adapter

    dtypes = {spelled: dtype for dtype, spelled in DTYPE_NAMES.items()}
    entries = read_header(adapter.path).tensors
    shapes = {}
    for module in adapter.modules:
        for factor in "AB":
            entry = entries[adapter.keys[module, factor]]
            shapes[tensor_name(module, factor)] = (dtypes[entry.dtype], entry.shape)
        if module in adapter.magnitudes:
            dtype = dtypes[entries[adapter.magnitudes[module]].dtype]
            shapes[magnitude_name(module)] = (dtype, (adapter.shapes[module].out_features,))
    for module, rows in adapter.tokens.items():
        entry = entries[rows.key]
        shapes[rows_name(module)] = (dtypes[entry.dtype], entry.shape)
    config = adapter.config
    hub_id = base_id(adapter)
    known = linear_modules(base) if base is not None else ()
    folder.mkdir()
    files = write_adapter(folder, replace(config, base_model=hub_id), shapes, tensors_of(adapter), None, known=known)
    targets = config.target_modules if config.narrowing is None else tuple(sorted(adapter.modules))
    lineage = {
        "kind": "pull",
        "base": {"hub_id": hub_id, **({"revision": revision} if hub_id and revision else {})},
        "adapter": {
            "rank": config.rank,
            "alpha": config.alpha,
            "target_modules": targets if isinstance(targets, str) else list(targets),
            **({"tokens": len(ids)} if (ids := adapter.token_ids) else {}),
            "num_parameters": adapter.num_parameters,
        },
    }
    return files, lineage
