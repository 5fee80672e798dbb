"""AdapterPool: adapters read, checked and kept in host memory, by content digest. Names are none of its business."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.errors import BadFile, Incompatible
from adapterhub_local.lora.adapter import AdapterFile, Delta, open_adapter
from adapterhub_local.merge.dora import row_scales
from adapterhub_local.registry import Version
from serve.adapters.compatibility import check_base, check_modules, check_origin
from serve.adapters.mixture import Mixture, mixed_factors
from serve.adapters.slots import Factors
from serve.errors import Busy

logger = logging.getLogger(__name__)
PINNED = 16 << 20  # bytes of a piece of pinned memory, of which torch gives powers of two
# module -> its weight (out_features, in_features), in the dtype that DoRA takes norms in
WeightOf = Callable[[str], torch.Tensor]
# how far from 1 the scales of a DoRA adapter may be that was never trained: PEFT begins with lengths in 16 bits
UNTRAINED = 2.0**-8


@dataclass(eq=False)
class PooledAdapter:
    """An adapter in memory, its factors as slots take them. `users` hold it there."""

    digest: str
    factors: Factors
    users: int = 0
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = sum(tensor.nbytes for factor in self.factors.values() for tensor in factor)


@dataclass(frozen=True)
class Hold:
    """One hold on an adapter in memory, by its content digest; `was_read`: its files were read for this very hold."""

    digest: str
    was_read: bool


class AdapterPool:
    """The adapters of one base within a budget of bytes; those without users leave first, least recently used first.

    Safe to use from several threads: `acquire` reads files and is meant for a worker, `get` is for the step loop.
    """

    def __init__(
        self,
        base: BaseInfo,
        shapes: Mapping[str, tuple[int, int]],
        weight: WeightOf,
        *,
        dtype: torch.dtype,
        max_bytes: int,
        pin_memory: bool = False,
    ) -> None:
        self.base = base
        self.shapes = shapes  # module -> (in_features, out_features)
        self.weight = weight
        self.dtype = dtype
        self.max_bytes = max_bytes
        self.pin_memory = pin_memory  # for copies to a GPU that run beside its work
        self.num_loads = 0
        self.num_evictions = 0
        self._adapters: OrderedDict[str, PooledAdapter] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return self._num_bytes()

    def __len__(self) -> int:
        return len(self._adapters)

    def acquire(self, version: Version | Mixture) -> Hold:
        """Have the version's adapter, or the mixture, in memory and hold it there until `release`.

        Raises Incompatible or BadFile, naming modules and tensors, if it does not belong to the base; Corrupt
        if its files are damaged; Busy if all of the budget is in use.
        """
        digest = version.content_digest
        for part in (version,) if isinstance(version, Version) else (part for part, _ in version.terms):
            check_base(part, self.base)
        with self._lock:
            loading = self._loading.setdefault(digest, threading.Lock())
        try:
            with loading:  # the same adapter is read once, different ones side by side
                if is_missing := not self._hold(digest):
                    factors = self._mix(version) if isinstance(version, Mixture) else self._read(version)
                    self._add(PooledAdapter(digest, _pinned(factors) if self.pin_memory else factors), str(version))
        finally:
            with self._lock:
                self._loading.pop(digest, None)
        return Hold(digest, was_read=is_missing)

    def drop(self, digest: str) -> int:
        """Take an adapter that nobody holds out of memory; the bytes that are free now, 0 if it is held or not here."""
        with self._lock:
            adapter = self._adapters.get(digest)
            if adapter is None or adapter.users:
                return 0
            del self._adapters[digest]
            return adapter.num_bytes

    def bytes_of(self, digest: str) -> int:
        """Memory of an adapter, 0 if it is not here."""
        with self._lock:
            return self._adapters[digest].num_bytes if digest in self._adapters else 0

    def loading(self) -> list[str]:
        """Digests of adapters that are being read."""
        with self._lock:
            return [digest for digest in self._loading if digest not in self._adapters]

    def users(self) -> dict[str, int]:
        """Digest -> how often it is held, of every adapter in memory, least recently used first."""
        with self._lock:
            return {digest: adapter.users for digest, adapter in self._adapters.items()}

    def get(self, digest: str) -> Factors:
        """The factors of an adapter that is held."""
        with self._lock:
            return self._adapters[digest].factors

    def release(self, digest: str) -> None:
        """Undo one `acquire`."""
        with self._lock:
            adapter = self._adapters[digest]
            assert adapter.users > 0, digest
            adapter.users -= 1

    def _read(self, version: Version) -> Factors:
        try:
            return load_factors(version, self.base, self.shapes, self.weight, self.dtype)
        except BadFile as error:  # clients read this: where the file is they need not know
            raise BadFile(str(error).replace(str(version.path), f"'{version}'")) from None

    def _mix(self, mixture: Mixture) -> Factors:
        """The mixture's factors, made of those of its parts, which are held only while that takes."""
        held: list[str] = []
        try:
            parts = []
            for version, weight in mixture.terms:
                held.append(self.acquire(version).digest)
                parts.append((self.get(held[-1]), weight))
            return mixed_factors(parts, self.dtype)
        finally:
            for digest in held:
                self.release(digest)

    def _hold(self, digest: str) -> bool:
        with self._lock:
            if digest not in self._adapters:
                return False
            self._adapters.move_to_end(digest)
            self._adapters[digest].users += 1
            return True

    def _add(self, adapter: PooledAdapter, name: str) -> None:
        with self._lock:
            if adapter.digest in self._adapters:
                self._adapters[adapter.digest].users += 1
                return
            idle = [other for other in self._adapters.values() if not other.users]
            held = self._num_bytes() - sum(other.num_bytes for other in idle)
            if adapter.num_bytes > self.max_bytes:
                raise Incompatible(
                    f"'{name}' needs {adapter.num_bytes:,} bytes, all adapters may take {self.max_bytes:,}: "
                    "start the server with more memory for adapters"
                )
            if held + adapter.num_bytes > self.max_bytes:
                raise Busy(f"no memory for '{name}' while other adapters are in use: try again later")
            while self._num_bytes() + adapter.num_bytes > self.max_bytes:
                del self._adapters[idle.pop(0).digest]
                self.num_evictions += 1
            adapter.users = 1
            self._adapters[adapter.digest] = adapter
            self.num_loads += 1

    def _num_bytes(self) -> int:
        return sum(adapter.num_bytes for adapter in self._adapters.values())


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
    return {module: tuple(next(held) for _ in own) for module, own in factors.items()}


def load_factors(
    version: Version, base: BaseInfo, shapes: Mapping[str, tuple[int, int]], weight: WeightOf, dtype: torch.dtype
) -> dict[str, tuple[torch.Tensor, ...]]:
    """Read and check a version's adapter: every module must be a linear layer of the base with that very shape.

    Raises Incompatible naming what does not fit, or that the adapter changes nothing; BadFile, Corrupt.
    """
    adapter = open_adapter(version.path, dora=True)
    check_origin(adapter, version, base)
    check_modules(adapter, str(version), base, shapes)
    factors: dict[str, tuple[torch.Tensor, ...]] = {}
    has_effect = False
    for module, delta in adapter.deltas():
        a = delta.A.T.to(dtype).contiguous()  # each slot's product reads it row by row
        b = delta.B.T.float() * delta.scaling
        scale: tuple[torch.Tensor, ...] = ()
        if module in adapter.magnitudes:
            # g (W x + s B A x) = W x + (g - 1) W x + (s B g) A x
            g = _dora_scales(adapter, module, delta, weight(module), str(version))
            b *= g
            scale = ((g - 1).to(dtype),)
            has_effect = has_effect or bool(((g - 1).abs() > UNTRAINED).any())
        factors[module] = (a, b.to(dtype).contiguous(), *scale)
        has_effect = has_effect or bool(a.any() and b.any())
    if not has_effect:
        raise Incompatible(f"'{version}' changes nothing: one factor of every module is zero. Was it trained?")
    return factors


def _dora_scales(adapter: AdapterFile, module: str, delta: Delta, weight: torch.Tensor, name: str) -> torch.Tensor:
    """DoRA's factor of each row (out_features), float32 on the CPU. Raises Incompatible if a row has none."""
    scales = row_scales(weight, delta, adapter.magnitude(module), weight.dtype).cpu()
    if not torch.isfinite(scales).all():
        raise Incompatible(f"'{name}' rescales a row of {module} that is zero, by no finite number: train it anew")
    return scales
