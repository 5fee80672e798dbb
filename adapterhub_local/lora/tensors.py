"""What each tensor of an adapter's file is, by its name, dtype and shape; one that is nothing of a LoRA is refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_local.errors import BadFile
from adapterhub_local.lora.header import Header
from adapterhub_local.lora.names import parse_name

FLOATS = ("F64", "F32", "F16", "BF16")  # from wide to narrow
# what a tensor is that cannot be read as a factor -> why not
_REASONS = {
    "bias": "its B factors have a bias (lora_bias), which is not supported",
    "embedding": "it adapts an embedding, and only linear layers are adapted here: train without it",
    "saved": "it replaces a whole module of the shared base (modules_to_save): fuse it into the model "
    "(PEFT: merge_and_unload) and add that as a base of its own",
    "mlx": "it is named as MLX-LM names it: `qhub add` takes the folder, with its adapter_config.json",
}


@dataclass
class Tensors:
    """The names of a file's tensors by what they are. `copies` may be tensors of a base, which only that can tell."""

    keys: dict[tuple[str, str], str]
    magnitudes: dict[str, str]
    copies: dict[str, str]
    spelled: dict[str, str]  # module -> how the file calls it
    tokens: dict[str, str]  # embeddings or head -> the tensor of its rows

    @classmethod
    def of(cls, path: Path, header: Header) -> "Tensors":
        """Those of the file at `path`. Raises BadFile for one that is none of them, or is there twice."""
        found = cls({}, {}, {}, {}, {})
        adapters: dict[str, str] = {}
        for name, entry in header.tensors.items():
            parts = parse_name(name)
            if parts.kind in _REASONS:
                raise BadFile(f"{path} has {name!r}: {_REASONS[parts.kind]}")
            if parts.kind in ("weight", "unknown"):
                if parts.kind == "unknown" or entry.dtype not in FLOATS or not name.endswith((".weight", ".bias")):
                    raise BadFile(
                        f"{path}: {name!r} {list(entry.shape)} {entry.dtype} is not a LoRA factor of a linear layer"
                    )
                found._add_once(path, found.copies, parts.module, name)
                continue
            if entry.dtype not in FLOATS:
                raise BadFile(
                    f"{path}: {name!r} {list(entry.shape)} {entry.dtype} is not a LoRA factor in floating point: save "
                    "it as F32, F16 or BF16"
                )
            adapters.setdefault(parts.adapter, name)
            if parts.kind == "magnitude":
                found._add_once(path, found.magnitudes, parts.module, name)
                continue
            if parts.kind == "tokens":
                found._add_once(path, found.tokens, parts.module, name)
                continue
            if len(entry.shape) != 2:
                raise BadFile(
                    f"{path}: {name!r} {list(entry.shape)} {entry.dtype} is not a LoRA factor of a linear layer"
                )
            found._add_once(path, found.keys, (parts.module, parts.kind), name)
            if found.spelled.setdefault(parts.module, parts.spelled) != parts.spelled:
                found.spelled[parts.module] = parts.module
        if len(adapters) > 1:
            shown = ", ".join(sorted(adapters)[:8])
            raise BadFile(
                f"{path} holds several adapters ({shown}): save each by itself (PEFT: selected_adapters=[...])"
            )
        if not found.keys:
            raise BadFile(f"{path} holds no LoRA factors")
        found.copies = {name: wanted for wanted, name in found.copies.items()}
        return found

    @staticmethod
    def _add_once(path: Path, where: dict[Any, str], key: Any, name: str) -> None:
        if (before := where.setdefault(key, name)) != name:
            raise BadFile(
                f"{path}: {name} is there twice, the other time as {before}: their names differ by a wrapper only"
            )
