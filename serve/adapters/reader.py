"""Reading adapters: a source's files become factors as slots take them, once they are found to belong to the base."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.fit import check_copies, renamed_for
from adapterhub_local.base.vocabulary import fit_rows
from adapterhub_local.errors import BadFile, Incompatible
from adapterhub_local.lora.adapter import AdapterFile, Delta, open_adapter
from adapterhub_local.merge.dora import row_scales
from serve.adapters.compatibility import check_base, check_modules, check_origin
from serve.adapters.source import Source
from serve.lora.in_place import in_order, laid_out, lay_out
from serve.lora.linear import MultiLoraLinear
from serve.lora.product import Factors
from serve.lora.rows import Embeddings, OwnRows, WithRows, rows_of

logger = logging.getLogger(__name__)
NARROW = (torch.bfloat16, torch.float16)
PINNED = 16 << 20  # bytes of a piece of pinned memory, of which torch gives powers of two
# module -> its weight (out_features, in_features), in the dtype that DoRA takes norms in
WeightOf = Callable[[str], torch.Tensor]
# how far from 1 the scales of a DoRA adapter may be that was never trained: PEFT begins with lengths in 16 bits
UNTRAINED = 2.0**-8


@dataclass(frozen=True, eq=False)
class AdapterReader:
    """Reads adapters for one base, whose linear layers have `shapes`: module -> (in_features, out_features)."""

    base: BaseInfo
    shapes: Mapping[str, tuple[int, int]]
    weight: WeightOf
    dtype: torch.dtype
    pin_memory: bool = False  # for copies to a GPU that run beside its work
    in_place: Mapping[str, MultiLoraLinear] | None = None  # layers whose kernels read adapters where they are kept
    embeddings: Embeddings | None = None  # None: adapters with rows of them are refused

    def check(self, source: Source) -> None:
        """Raise Incompatible if the source says that it was made for another base; reads no file."""
        check_base(source, self.base)

    def read(self, source: Source) -> Factors:
        """The factors in the source's files. Raises as `load_factors`."""
        try:
            return load_factors(source, self.base, self.shapes, self.weight, self.dtype, self.embeddings, self.in_place)
        except BadFile as error:  # clients read this: where the file is they need not know
            raise BadFile(str(error).replace(str(source.path), f"'{source}'")) from None

    def placed(self, factors: Factors) -> Factors:
        """The factors as they are to be kept: in place, or until they are copied into slots."""
        if self.in_place is not None:
            return laid_out(factors, self.in_place)
        return _pinned(factors) if self.pin_memory else _dense(factors)


def _dense(factors: Factors) -> Factors:
    """The factors with neighbours in their last dimension, so that slots are filled row by row."""
    found = {module: tuple(tensor.contiguous() for tensor in own) for module, own in factors.items()}
    rows = rows_of(factors)
    return found if rows is None else WithRows(found, rows)


def _pinned(factors: Factors) -> Factors:
    """The factors in pages that the system does not move, if it has enough of such."""
    # in a few large pieces: to pin each of a thousand tensors by itself takes longer than to read them
    pieces: list[list[torch.Tensor]] = []
    for tensor in (tensor for own in factors.values() for tensor in own):
        if not pieces or sum(each.numel() for each in pieces[-1]) + tensor.numel() > PINNED // tensor.itemsize:
            pieces.append([])
        pieces[-1].append(tensor)
    pinned: list[torch.Tensor] = []
    try:
        for piece in pieces:
            flat = torch.cat([tensor.flatten() for tensor in piece]).pin_memory()
            parts = flat.split([tensor.numel() for tensor in piece])
            pinned += [part.view(tensor.shape) for part, tensor in zip(parts, piece, strict=True)]
    except RuntimeError as error:
        logger.warning("an adapter is kept in memory that is not pinned: %s", error)
        return factors
    held = iter(pinned)
    found = {module: tuple(next(held) for _ in own) for module, own in factors.items()}
    rows = rows_of(factors)
    return found if rows is None else WithRows(found, rows)  # few: their copy may wait


def load_factors(
    source: Source,
    base: BaseInfo,
    shapes: Mapping[str, tuple[int, int]],
    weight: WeightOf,
    dtype: torch.dtype,
    embeddings: Embeddings | None = None,
    in_place: Mapping[str, MultiLoraLinear] | None = None,
) -> Factors:
    """Read and check a source's adapter: every module must be a linear layer of the base with that very shape.

    Its factors are in `dtype`, or as narrow as in its file where that is the same; laid out for the layers `in_place`,
    or views as the file holds them.

    Raises Incompatible naming what does not fit, or that the adapter changes nothing; BadFile, Corrupt.
    """
    adapter = open_adapter(source.path, dora=True, copies=True, tokens=embeddings is not None)
    check_origin(adapter, source, base)
    adapter = renamed_for(adapter, shapes)
    check_copies(adapter, base)
    check_modules(adapter, str(source), base, shapes)
    if embeddings is not None:
        adapter = fit_rows(adapter, embeddings.vocabulary, base.name)
    rows: OwnRows | None = None
    has_effect = False
    if embeddings is not None and adapter.tokens:
        rows = embeddings.own_rows(
            {module: (each.ids, adapter.rows(module)) for module, each in adapter.tokens.items()}, dtype
        )
        has_effect = embeddings.changes(rows)

    def read(modules: tuple[str, ...]) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
        nonlocal has_effect
        for module, delta in adapter.deltas(modules):
            a = _narrowed(delta.A.T.to(dtype), delta.A.dtype)
            b = delta.B.T.float() * delta.scaling
            scale: tuple[torch.Tensor, ...] = ()
            if module in adapter.magnitudes:
                # g (W x + s B A x) = W x + (g - 1) W x + (s B g) A x
                g = _dora_scales(adapter, module, delta, weight(module), str(source))
                b *= g
                scale = ((g - 1).to(dtype),)
                has_effect = has_effect or bool(((g - 1).abs() > UNTRAINED).any())
            has_effect = has_effect or bool(a.any() and b.any())
            yield module, (a, _narrowed(b.to(dtype), delta.B.dtype), *scale)

    factors: Factors
    if in_place is not None:
        num_bytes = adapter.num_parameters * min(dtype.itemsize, adapter.dtype.itemsize)
        factors = lay_out(read(in_order(adapter.modules, in_place)), in_place, num_bytes, rows)
    else:
        factors = dict(read(adapter.modules))
        factors = factors if rows is None else WithRows(factors, rows)
    if not has_effect:
        raise Incompatible(f"'{source}' changes nothing: its scale or a factor of each module is zero. Was it trained?")
    return factors


def _narrowed(factor: torch.Tensor, held: torch.dtype) -> torch.Tensor:
    """A factor in the dtype that its file holds it in, if that is narrower and holds the very same numbers.

    Slots, or kernels, widen them: nothing is rounded, and twice as many adapters stay in memory.
    """
    if held not in NARROW or held.itemsize >= factor.itemsize:
        return factor
    small = factor.to(held)
    return small if torch.equal(small.to(factor.dtype), factor) else factor


def _dora_scales(adapter: AdapterFile, module: str, delta: Delta, weight: torch.Tensor, name: str) -> torch.Tensor:
    """DoRA's factor of each row (out_features), float32 on the CPU. Raises Incompatible if a row has none."""
    scales = row_scales(weight, delta, adapter.magnitude(module), weight.dtype).cpu()
    if not torch.isfinite(scales).all():
        raise Incompatible(f"'{name}' rescales a zero row of {module} by infinity: train it again")
    return scales
