"""Adapter files opened strictly and read one module at a time; `contents.py` reads what is in them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch

from adapterhub_local.errors import BadFile
from adapterhub_local.lora.config import AdapterConfig
from adapterhub_local.lora.contents import Shape, TokenRows, read_layout
from adapterhub_local.lora.header import Header

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Delta:
    """One module's low-rank change of weight: `scaling * B @ A`, kept factored.

    A has shape (rank, in_features), B (out_features, rank), both of the same floating dtype.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def dense(self) -> torch.Tensor:
        """The delta as a matrix (out_features, in_features), in float32 or wider."""
        wide = torch.promote_types(self.A.dtype, torch.float32)
        return self.scaling * (self.B.to(wide) @ self.A.to(wide))


@dataclass(frozen=True)
class AdapterFile:
    """An opened adapter: config, shapes of its modules, and their deltas read on demand."""

    path: Path
    header: Header
    config: AdapterConfig
    base_fingerprint: str | None
    shapes: Mapping[str, Shape]
    keys: Mapping[tuple[str, str], str]  # (module, "A" or "B") -> name of the tensor in the file
    dtype: torch.dtype
    magnitudes: Mapping[str, str] = field(default_factory=dict)  # module -> name of its lengths, DoRA only
    copies: Mapping[str, str] = field(default_factory=dict)  # tensor beside the factors -> the base's name of it
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)  # embeddings or head -> the adapter's own rows of it

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def num_parameters(self) -> int:
        factors = sum(shape.rank * (shape.in_features + shape.out_features) for shape in self.shapes.values())
        return factors + sum(len(rows.ids) * rows.hidden for rows in self.tokens.values())

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens that it has rows of its own for, in embeddings or head; they ascend."""
        return tuple(sorted({each for rows in self.tokens.values() for each in rows.ids}))

    def renamed(self, names: Mapping[str, str]) -> "AdapterFile":
        """The same adapter with its modules called otherwise: `names` are module -> new name, all different."""
        if all(new == module for module, new in names.items()):
            return self
        assert len(set(names.values())) == len(self.shapes), "two modules cannot have one name"
        return replace(
            self,
            config=self.config.pinned({new: module for module, new in names.items()}),
            shapes={names[module]: shape for module, shape in self.shapes.items()},
            keys={(names[module], factor): key for (module, factor), key in self.keys.items()},
            magnitudes={names[module]: key for module, key in self.magnitudes.items()},
        )

    def with_rows_of(self, names: Mapping[str, str]) -> "AdapterFile":
        """The same adapter with the modules that it has rows of called otherwise: module -> new name."""
        config = replace(self.config, tokens={names[module]: ids for module, ids in self.config.tokens.items()})
        return replace(self, config=config, tokens={names[module]: rows for module, rows in self.tokens.items()})

    def rows(self, module: str) -> torch.Tensor:
        """The rows (tokens, hidden) of embeddings or head, in the order of their ids: not what is added to the base's,
        what takes their place. Raises BadFile if one has NaN or infinity in it."""
        with self._open() as file:
            rows = self._read(file, self.tokens[module].key)
        if not torch.isfinite(rows).all():
            raise BadFile(f"{self.path} has NaN or infinity in {self.tokens[module].key}: it was not trained soundly")
        return rows

    def magnitude(self, module: str) -> torch.Tensor:
        """DoRA's lengths of the rows of a module, (out_features). Raises BadFile if one is NaN or infinity."""
        with self._open() as file:
            lengths = self._read(file, self.magnitudes[module]).flatten()
        if not torch.isfinite(lengths).all():
            raise BadFile(f"{self.path} has NaN or infinity in {self.magnitudes[module]}: it was not trained soundly")
        return lengths

    def delta(self, module: str) -> Delta:
        """The delta of one module. Raises BadFile if a factor has NaN or infinity in it."""
        return next(self.deltas((module,)))[1]

    def deltas(self, modules: tuple[str, ...] | None = None) -> Iterator[tuple[str, Delta]]:
        """(module, delta) one at a time, in the order of `modules`."""
        with self._open() as file:
            for module in self.modules if modules is None else modules:
                factors = {key: self._read(file, self.keys[module, key]) for key in "AB"}
                for key, factor in factors.items():
                    # least and largest entry are NaN if any is; several times faster than looking at each
                    if not all(map(math.isfinite, torch.stack(torch.aminmax(factor)).tolist())):
                        raise BadFile(
                            f"{self.path} has NaN or infinity in {self.keys[module, key]}: it was not trained soundly"
                        )
                yield module, Delta(factors["A"], factors["B"], self.config.scaling(module))

    def changes_nothing(self) -> bool:
        """Whether every delta is zero, as that of an adapter which was not trained.

        What DoRA's lengths and rows of embeddings change is not known without the base, and counts as a change.
        """
        return not (self.magnitudes or self.tokens) and not any(
            delta.scaling and delta.A.any() and delta.B.any() for _, delta in self.deltas()
        )

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor by its name in the file, on the CPU."""
        with self._open() as file:
            return self._read(file, name)

    def _open(self) -> BinaryIO:
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise BadFile(f"{self.path} cannot be read: {error.strerror}") from None

    def _read(self, file: BinaryIO, name: str) -> torch.Tensor:
        """A tensor's bytes, copied: safetensors' own `get_tensor` (0.8) loses 62 bytes for each it gives away.

        A server that loads adapters all day would lose 26 KB with each of 210 modules.
        """
        entry = self.header.tensors[name]
        tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        file.seek(self.header.start + entry.start)
        if file.readinto(tensor.view(torch.uint8).numpy()) != tensor.nbytes:  # type: ignore[attr-defined]
            raise BadFile(f"{self.path} cannot be read: it was truncated after its header was read")
        return tensor


def open_adapter(
    path: Path, *, alpha: float | None = None, dora: bool = False, copies: bool = False, tokens: bool = False
) -> AdapterFile:
    """Open a PEFT folder or a single file, without reading tensors; see `read_layout` for what it takes and refuses."""
    layout = read_layout(path, alpha=alpha, dora=dora, copies=copies, tokens=tokens)
    return AdapterFile(
        layout.path,
        layout.header,
        layout.config,
        layout.base_fingerprint,
        layout.shapes,
        layout.keys,
        _DTYPES[layout.dtype],
        layout.magnitudes,
        layout.copies,
        layout.tokens,
    )
