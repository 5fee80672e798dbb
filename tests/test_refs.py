"""References, mixes and names: everything either parses and prints back the same, or is refused with its reason."""

import contextlib
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adapterhub_local.errors import BadReference
from adapterhub_local.refs import MAX_NAME_LENGTH, Mix, Reference, check_alias, check_name, parse_weight

DIGEST = "sha256:" + "ab12" * 16
GOOD = {  # spelling -> how it prints
    "sentiment": "sentiment",
    "sentiment@latest": "sentiment",
    "sentiment@3": "sentiment@3",
    "sentiment@v3": "sentiment@3",
    "sentiment@03": "sentiment@3",
    "sentiment@2147483647": "sentiment@2147483647",
    "sentiment@prod": "sentiment@prod",
    "sentiment@v3.1": "sentiment@v3.1",
    "sentiment@vim": "sentiment@vim",
    f"sentiment@{DIGEST}": f"sentiment@{DIGEST}",
    "sentiment@sha256:ab12ab12ab12": "sentiment@sha256:ab12ab12ab12",
    "org/sentiment@3": "org/sentiment@3",
    "a": "a",
    "3": "3",
    "a.b_c-d": "a.b_c-d",
    "a" * MAX_NAME_LENGTH: "a" * MAX_NAME_LENGTH,
}
BAD = [
    *("", "@", "@3", "a@", "a@@", "a@@3", "@@@@@", "a@3@prod", "a@b@c"),
    *("a@0", "a@v0", "a@00", "a@-1", "a@+1", "a@1.", "a@2147483648", "a@" + "1" * 5000, "a@v" + "9" * 5000),
    *("..", ".", "a..b", "../a", "a/../b", "/a", "a/", "a//b", "a/b/c", ".hidden", "a/.b", "-a", "a-", "_a", "a_"),
    *("Sentiment", "a@Prod", "a@V3", "ä", "a@ä", "ａ", "а", "a@٣", "🙂", "a\u200b", "ı"),
    *(" a", "a ", "a b", "a@ 3", "a@3 ", "a\n", "a@3\n", "a\x00", "a\x1b[31m", "a\t", "\ud800"),
    *("a" * (MAX_NAME_LENGTH + 1), "a" * 100_000, "a@" + "b" * (MAX_NAME_LENGTH + 1)),
    *(
        "a@sha256:",
        "a@sha256:abc",
        "a@sha256:AB12AB12AB12",
        "a@sha256:" + "a" * 65,
        "a@sha512:" + "a" * 64,
        "a@md5"[:2],
    ),
    *("a:b", "a\\b", "a*b", "a+b", "a@..", "a@a..b", "a@a/b", "~a", "$a", "a;b", "a%2fb", "C:\\a"),
]

BAD_MIXES = [
    *("", "+", "a+", "+a", "a++b", "a*", "a**2", "*0.5", "0.5*a", "a*0.5*0.5", "a@0*1", "A*1", "a*1e16+"),
    *("a*nan", "a*inf", "a*-inf", "a*1e999", "a*0x1", "a*1_0", "a*1,5", "a*٣", "a*e", "a*.", "a*" + "9" * 9999),
]


@pytest.mark.parametrize(("text", "printed"), GOOD.items())
def test_good_spellings_parse_and_print_back(text: str, printed: str) -> None:
    """A reference prints in its one canonical form, and that form parses to the same reference."""
    reference = Reference.parse(text)
    assert str(reference) == printed
    assert Reference.parse(printed) == reference


@pytest.mark.parametrize("text", BAD, ids=lambda text: ascii(text)[:24])
def test_bad_spellings_are_refused_in_one_short_line(text: str) -> None:
    """What is not a reference is refused with a printable message that fits a line, however long or hostile it is."""
    with pytest.raises(BadReference) as caught:
        Reference.parse(text)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 300


@pytest.mark.parametrize(
    "alias", ["latest", "3", "v3", "007", "", "Prod", "a/b", "a@b", "a..b", "-a", "a" * 129, "1" * 9999]
)
def test_reserved_and_malformed_aliases_are_refused(alias: str) -> None:
    """An alias can never be taken for a version number, for `latest`, or for a path."""
    with pytest.raises(BadReference) as caught:
        check_alias(alias)
    assert len(str(caught.value)) < 300


def test_a_refused_alias_says_why() -> None:
    """The message of a reserved alias says that it is reserved, not that it is malformed."""
    with pytest.raises(BadReference, match="reserved"):
        check_alias("v12")
    assert check_alias("prod-eu.2") == "prod-eu.2"


@given(st.one_of(st.text(), st.text("ab3@:/.+*-_v", max_size=20), st.from_regex(r"[a-z0-9/.]{1,8}@[a-z0-9:.]{1,20}")))
@example("a@sha256:" + "0" * 64)
@example("a@latest")
def test_any_text_round_trips_or_is_refused(text: str) -> None:
    """Parsing never ends in anything but a reference that prints back to itself, or BadReference."""
    try:
        reference = Reference.parse(text)
    except BadReference:
        return
    assert Reference.parse(str(reference)) == reference
    assert check_name(reference.name) == reference.name
    assert sum(item is not None for item in (reference.version, reference.alias, reference.digest)) <= 1


NAMES = st.sampled_from(["a", "sql@prod", "tone@3", "org/x", f"y@{DIGEST}"])
WEIGHTS = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(NAMES.map(Reference.parse), WEIGHTS), min_size=1, max_size=5))
@example([(Reference("a"), 1e16), (Reference("b"), -1e-300)])
@example([(Reference("a"), -0.0)])
@example([(Reference("a"), 1.7976931348623157e308)])
def test_mixes_round_trip(terms: list[tuple[Reference, float]]) -> None:
    """A mix prints so that parsing it gives the same terms and the same weights to the last bit."""
    mix = Mix(tuple(terms))
    again = Mix.parse(str(mix))
    assert again == mix
    assert [math.copysign(1, weight) for _, weight in again.terms] == [math.copysign(1, weight) for _, weight in terms]


def test_mixes_as_people_write_them() -> None:
    """A weight left out is 1, a reference alone is a mix of one, order is kept, weights may be negative."""
    assert Mix.parse("a").is_single
    assert str(Mix.parse("a*1")) == "a"
    assert not Mix.parse("a*0.5").is_single
    assert Mix.parse("b*-0.5+a").terms == ((Reference("b"), -0.5), (Reference("a"), 1.0))
    assert str(Mix.parse("sql@prod*0.7+tone*.3")) == "sql@prod*0.7+tone*0.3"
    assert Mix.parse("a*1e16+b*1E-3").terms[0][1] == 1e16


@pytest.mark.parametrize("text", BAD_MIXES, ids=lambda text: ascii(text)[:24])
def test_bad_mixes_are_refused(text: str) -> None:
    """A mix with a missing term, a weight that is not a finite number, or a bad reference is refused."""
    with pytest.raises(BadReference):
        Mix.parse(text)


@example("0\x1f")  # white space to `strip`, but not to `float`
@given(st.text(max_size=12))
def test_any_text_is_a_finite_weight_or_refused(text: str) -> None:
    """No text becomes NaN, infinity or an error other than BadReference."""
    with contextlib.suppress(BadReference):
        assert math.isfinite(parse_weight(text))
