"""ModelRef: which weights a request asks for, read once from `model` and `adapters` and never spelled out again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from adapterhub_local.errors import BadReference
from adapterhub_local.refs import Mix, Reference, spelled
from serve.errors import BadParameter, ModelNotFound
from serve.options import MAX_TERMS

AUTO = "auto"  # the model that a router chooses, where the server has one
MAX_WEIGHT = 10_000.0  # beyond it numbers of 32 bits overflow where products of adapters are multiplied


@dataclass(frozen=True)
class ModelRef:
    """What is asked of the served base: a mix on top of it, or None for the base alone."""

    text: str  # as it was asked for, which answers give back
    base: str  # the base's name
    mix: Mix | None = None
    name: str | None = None  # of an adapter, if the reference is that alone: its traffic may be split
    side: str | None = None  # the alias that answers, if it is

    @property
    def names(self) -> tuple[str, ...]:
        """The base's or the adapters' names, which a key must be for. Weights of zero are named, too."""
        return (self.base,) if self.mix is None else tuple(reference.name for reference, _ in self.mix.terms)

    def on_side(self, alias: str) -> "ModelRef":
        """The same, answered by one of the aliases that a name's traffic is split between."""
        assert self.name is not None, self.text
        return replace(self, mix=Mix(((Reference(self.name, alias=alias), 1.0),)), side=alias)

    def pinned(self, versions: str) -> "ModelRef":
        """The same, answered by exactly these versions, which somebody looked up before."""
        return replace(self, mix=Mix.parse(versions), name=None)


def read_model(model: str, base: str, adapters: Sequence[tuple[str, float]] = ()) -> ModelRef:
    """What `model`, with `adapters` (references and weights) on top of it, asks of the base that is served.

    `model` is the base's name, `reference`, `base:reference`, or a mix instead of the reference; with `adapters` it
    is the base's name. Raises ModelNotFound if it cannot be read, BadParameter for more terms or larger weights than
    can be mixed. Nothing is looked up.
    """
    if adapters:
        return _read_adapters(model, base, adapters)
    if model == base:
        return ModelRef(model, base)
    rest = model.removeprefix(f"{base}:")
    if rest.count("+") >= MAX_TERMS:
        raise BadParameter(_too_many(rest.count("+") + 1), "model")
    try:
        mix = Mix.parse(rest)
    except BadReference as error:
        raise _not_found(rest, base, str(error)) from None
    _check_weights(mix, "model")
    return ModelRef(model, base, mix, name=rest if rest == mix.terms[0][0].name else None)


def _read_adapters(model: str, base: str, adapters: Sequence[tuple[str, float]]) -> ModelRef:
    if len(adapters) > MAX_TERMS:
        raise BadParameter(_too_many(len(adapters)), "adapters")
    text = spelled(adapters)
    try:
        mix = Mix(tuple((Reference.parse(reference), weight) for reference, weight in adapters))
    except BadReference as error:
        raise _not_found(text, base, str(error)) from None
    if model != base:
        raise ModelNotFound(_other_base(base, mix))
    _check_weights(mix, "adapters")
    return ModelRef(f"{model}:{text}", base, mix)


def _check_weights(mix: Mix, param: str) -> None:
    for reference, weight in mix.terms:
        if abs(weight) > MAX_WEIGHT:
            raise BadParameter(
                f"the weight {weight!r} of '{reference}' is too large: weights go from -{MAX_WEIGHT:,.0f} to "
                f"{MAX_WEIGHT:,.0f}",
                param,
            )


def _not_found(text: str, base: str, reason: str) -> ModelNotFound:
    """What to answer to a text that cannot be read: perhaps it names another base."""
    try:
        return ModelNotFound(_other_base(base, Mix.parse(text.partition(":")[2])))
    except BadReference:
        return ModelNotFound(f"{reason} (served are base '{base}' and its adapters, see /v1/models)")


def _other_base(base: str, mix: Mix) -> str:
    return f"the base that is served here is '{base}': ask for '{mix}', or '{base}:{mix}'"


def _too_many(count: int) -> str:
    return f"a mix of {count:,} adapters: at most {MAX_TERMS} can be mixed"
