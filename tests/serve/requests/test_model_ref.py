"""What `model` and `adapters` are read as: one value, bounded before anything is looked up."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.refs import Mix, Reference, spelled
from serve.errors import BadParameter, ModelNotFound
from serve.options import MAX_TERMS
from serve.requests.model_ref import MAX_WEIGHT, ModelRef, read_model

NAMES = st.sampled_from(["alpha", "beta", "team/gamma"])
REFERENCES = st.one_of(NAMES, st.builds("{}@{}".format, NAMES, st.sampled_from(["1", "prod", "sha256:0123456789ab"])))
WEIGHTS = st.floats(-MAX_WEIGHT, MAX_WEIGHT)


@pytest.mark.parametrize(
    ("model", "mix", "name"),
    [
        ("tiny", None, None),
        ("alpha", "alpha", "alpha"),
        ("tiny:alpha", "alpha", "alpha"),
        ("alpha@latest", "alpha", None),
        ("alpha@1", "alpha@1", None),
        ("tiny:alpha@prod", "alpha@prod", None),
        ("alpha@sha256:0123456789ab", "alpha@sha256:0123456789ab", None),
        ("alpha*1", "alpha", None),
        ("alpha*0", "alpha*0.0", None),
        ("alpha*-0.5+beta", "alpha*-0.5+beta*1.0", None),
        ("tiny@1", "tiny@1", None),
        ("tiny:tiny", "tiny", "tiny"),
    ],
)
def test_what_a_model_is(model: str, mix: str | None, name: str | None) -> None:
    """The base by its name alone, everything else on top of it; only a bare name can be split or a folder's."""
    ref = read_model(model, "tiny")
    assert (ref.text, ref.base, ref.name, ref.side) == (model, "tiny", name, None)
    assert (str(ref.mix) if ref.mix is not None else None) == mix


@given(st.lists(st.tuples(REFERENCES, WEIGHTS), min_size=1, max_size=MAX_TERMS))
def test_a_list_is_the_mix_that_it_spells(terms: list[tuple[str, float]]) -> None:
    """`adapters` and the same written behind the base's name are one mix, whatever the weights; names are all named."""
    ref = read_model("tiny", "tiny", terms)
    assert read_model(ref.text, "tiny").mix == ref.mix
    assert ref.text == f"tiny:{spelled(terms)}"
    assert ref.names == tuple(Reference.parse(reference).name for reference, _ in terms)


@pytest.mark.parametrize("count", [MAX_TERMS + 1, 1000, 300_000])
@pytest.mark.parametrize("prefix", ["", "tiny:", "other:"])
def test_too_many_terms_are_counted_first(prefix: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More terms than can be mixed are refused before one of them is read, equal ones too."""
    monkeypatch.setattr(Mix, "parse", None)
    monkeypatch.setattr(Reference, "parse", None)
    with pytest.raises(BadParameter, match=f"a mix of {count:,} adapters: at most {MAX_TERMS}"):
        read_model(prefix + "+".join(["alpha"] * count), "tiny")
    with pytest.raises(BadParameter, match=f"a mix of {count:,} adapters: at most {MAX_TERMS}"):
        read_model("tiny", "tiny", [("alpha", 0.1)] * count)


@given(REFERENCES, WEIGHTS.filter(bool), st.floats(allow_nan=False, allow_infinity=False))
def test_too_large_weights_are_named(reference: str, other: float, weight: float) -> None:
    """A weight is taken up to a bound, and refused beyond it, by its value and its adapter."""
    terms = [("beta", other), (reference, weight)]
    for model, adapters in ((spelled(terms), ()), ("tiny", terms)):
        if abs(weight) <= MAX_WEIGHT:
            assert read_model(model, "tiny", adapters).mix is not None
            continue
        with pytest.raises(BadParameter) as refused:
            read_model(model, "tiny", adapters)
        assert f"the weight {weight!r} of '{reference}' is too large" in str(refused.value)
        assert refused.value.param == ("adapters" if adapters else "model")


@pytest.mark.parametrize(
    ("model", "adapters", "message"),
    [
        ("", (), "'' is not a name"),
        ("other:alpha", (), "base that is served here is 'tiny': ask for 'alpha', or 'tiny:alpha'"),
        ("other", [("alpha", 1.0)], "ask for 'alpha', or 'tiny:alpha'"),
        ("tiny:alpha", [("beta", 2.0)], r"ask for 'beta\*2.0'"),
        ("other:../x", (), "is not a name"),
        ("alpha*x", (), "is not a weight"),
        ("alpha*1e400", (), "is not a weight"),
        ("+", (), "is not a name"),
        ("tiny", [("../alpha", 1.0)], "is not a name"),
    ],
)
def test_what_cannot_be_read(model: str, adapters, message: str) -> None:
    """A text that names nothing is an unknown model, with the reason; another base's with what to ask for here."""
    with pytest.raises(ModelNotFound, match=message):
        read_model(model, "tiny", adapters)


def test_a_side_replaces_the_name() -> None:
    """Of a name whose traffic is split one alias answers, and the text stays what was asked for."""
    ref = read_model("tiny:alpha", "tiny").on_side("canary")
    assert ref == ModelRef("tiny:alpha", "tiny", Mix(((Reference("alpha", alias="canary"), 1.0),)), "alpha", "canary")
    assert math.isclose(sum(weight for _, weight in ref.mix.terms), 1)
