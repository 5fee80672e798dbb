"""Mixture: several versions in given proportions, used like one adapter and known by its content like one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from adapterhub_local.durable import canonical_json, digest_bytes
from adapterhub_local.refs import spelled
from serve.adapters.record import Label
from serve.adapters.source import Source
from serve.errors import BadParameter
from serve.lora.product import Factors
from serve.lora.rows import Embeddings, WithRows, rows_of
from serve.options import MAX_TERMS


@dataclass(frozen=True)
class Mixture:
    """A weighted sum of sources, no two of equal content, no weight zero. Where it is asked for, it is like one."""

    terms: tuple[tuple[Source, float], ...]

    def __str__(self) -> str:
        return spelled(self.terms)

    @property
    def parts(self) -> tuple[Source, ...]:
        return tuple(source for source, _ in self.terms)

    @property
    def name(self) -> str:
        """The adapters' names, without weights: what counts are kept by."""
        return "+".join(sorted({version.name for version, _ in self.terms}))

    @property
    def created_at(self) -> str:
        return max(version.created_at for version, _ in self.terms)

    @cached_property
    def content_digest(self) -> str:
        """The same for equal contents in equal proportions, in whatever order and under whatever names."""
        terms = sorted([version.content_digest, weight] for version, weight in self.terms)
        return digest_bytes(canonical_json(["mix", terms]))


def label_of(source: Source | Mixture) -> Label:
    """How a source is shown."""
    parts = source.parts if isinstance(source, Mixture) else (source,)
    return Label(str(source), tuple(sorted({part.name for part in parts})))


def mixture(terms: Sequence[tuple[Source, float]]) -> Source | Mixture | None:
    """What a sum of sources is: a mixture, a single source if that is all, None for the base itself.

    Equal contents are added up and weights of zero left out. Raises BadParameter for too many terms.
    """
    weights: dict[str, tuple[Source, float]] = {}
    for version, weight in terms:
        known, before = weights.get(version.content_digest, (version, 0.0))
        weights[version.content_digest] = (known, before + weight)
    kept = tuple(sorted(((v, w) for v, w in weights.values() if w), key=lambda term: term[0].content_digest))
    if len(kept) > MAX_TERMS:
        raise BadParameter(f"a mix of {len(kept)} adapters: at most {MAX_TERMS} can be mixed", "model")
    if not kept:
        return None
    return kept[0][0] if len(kept) == 1 and kept[0][1] == 1 else Mixture(kept)


def mixed_factors(
    parts: Sequence[tuple[Factors, float]], dtype: torch.dtype, embeddings: Embeddings | None = None
) -> Factors:
    """The factors of a weighted sum: side by side, the weight in B, so that there are no cross terms.

    A (in_features, sum of ranks), B (sum of ranks, out_features); exact for any ranks and modules, and signs, and for
    DoRA too: W + sum of w_i (W_i - W), whose scales of W x are the weighted sum of those of the parts. Rows of
    `embeddings` are summed in the same way, a part without a row of a token having the base's. Raises
    BadParameter for a weight that overflows.
    """
    mixed: dict[str, tuple[torch.Tensor, ...]] = {}
    for module in dict.fromkeys(module for factors, _ in parts for module in factors):
        own = [(factors[module], weight) for factors, weight in parts if module in factors]
        a = torch.cat([each[0] for each, _ in own], dim=1)
        scaled = [(each[1].float() * weight).to(dtype) for each, weight in own]
        for part, (_, weight) in zip(scaled, own, strict=True):
            if not torch.isfinite(part).all():
                kind = str(dtype).removeprefix("torch.")
                raise BadParameter(f"the weight {weight!r} is too large: {module} overflows in {kind}", "model")
        b = torch.cat(scaled)
        scales = [each[2].float() * weight for each, weight in own if len(each) > 2]
        mixed[module] = (a, b, torch.stack(scales).sum(0).to(dtype)) if scales else (a, b)
    rows = embeddings.mixed([(rows_of(part), share) for part, share in parts]) if embeddings is not None else None
    if rows is None:
        return mixed
    if not all(bool(torch.isfinite(each.vectors).all()) for each in rows):
        raise BadParameter("a weight is too large: the rows of the embeddings overflow", "model")
    return WithRows(mixed, rows)
