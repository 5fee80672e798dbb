"""Mixture: several versions in given proportions, used like one adapter and known by its content like one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from adapterhub_local.durable import canonical_json, digest_bytes
from adapterhub_local.refs import spelled
from serve.adapters.record import Label
from serve.adapters.source import Source
from serve.errors import BadParameter
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
