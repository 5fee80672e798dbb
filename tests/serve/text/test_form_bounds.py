"""Bounds of forms: what repetitions spell out is counted right, in linear time, for patterns and through names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import BadParameter
from serve.text.compiler import FormCompiler
from serve.text.form_bounds import MAX_SPELLED, bound_pattern, bound_rules, bound_schema
from tests.tiny import VOCABULARY, byte_tokenizer

LEAF = st.sampled_from([("a", 1), (r"\(", 1), ("[(]", 1), ("[^]{9}]", 1), (".", 1)])


def grown(inner: st.SearchStrategy) -> st.SearchStrategy:
    """Patterns of other patterns, with how many characters they spell out at least."""
    joined = st.lists(inner, min_size=1, max_size=3).map(
        lambda parts: (f"({''.join(text for text, _ in parts)})", sum(size for _, size in parts))
    )
    repeated = st.tuples(inner, st.integers(1, 300)).map(lambda it: (f"({it[0][0]}){{{it[1]}}}", it[0][1] * it[1]))
    return joined | repeated


@given(st.recursive(LEAF, grown, max_leaves=8))
def test_repetitions_multiply(pattern: tuple[str, int]) -> None:
    """A pattern is refused if and only if its repetitions spell out more than they may, however they are nested."""
    text, size = pattern
    if size > len(text) + MAX_SPELLED:
        with pytest.raises(BadParameter, match="spell out 50,000"):
            bound_pattern(text, "p")
    else:
        bound_pattern(text, "p")


@pytest.mark.parametrize(
    "grammar",
    [
        'start: A\nA: B{300}\nB: C{300}\nC: "ab"',
        "start: A\nA: B {300}\n B :C ~ 300\nC: /a/",
        "start: A\nA: /(a{300}){300}/i",
        'start: A A\nA: ("a" B{400})\nB: "x"{400}',
    ],
)
def test_repetitions_multiply_through_names(grammar: str) -> None:
    """Terminals are spelled out inside of others, however they are written."""
    with pytest.raises(BadParameter, match="spell out"):
        bound_rules(grammar, "p")


@pytest.mark.parametrize(
    "grammar",
    [
        'start: line{1,500}\nline: WORD (" " WORD){0,40} "\\n"\nWORD: /[a-z]{1,30}/',
        'start: a\na: "x" a | "y" // {9}{9}{9}{99999}',
        "no definition at all",
        "start: A\nA: B\nB: A",
        'start: "{1000}{1000}{1000}"',
    ],
)
def test_ordinary_grammars_pass(grammar: str) -> None:
    """What people write, recursion, comments and literals with braces pass."""
    bound_rules(grammar, "p")


@pytest.mark.parametrize("text", ["[" * 50_000, '"' + '\\"' * 40_000, "/" + "\\/" * 40_000, "(" * 50_000, "a" * 90_000])
def test_what_is_not_closed_is_read_once(text: str) -> None:
    """Text that never closes what it opens takes no quadratic time: this would last for minutes."""
    bound_pattern(text, "p")
    bound_rules("start: " + text, "p")


def test_schemas_are_bounded_in_depth_and_literals() -> None:
    """A schema of 100 levels and long literals passes, one more of either does not."""
    deep: dict = {"const": "a" * 50_000}
    for _ in range(98):
        deep = {"items": deep}
    bound_schema(deep, "p")
    for bad in ({"items": {"items": deep}}, {"enum": ["a" * 50_001]}, {"properties": {"a" * 50_001: {}}}):
        with pytest.raises(BadParameter):
            bound_schema(bad, "p")


def test_the_process_is_started_anew_when_it_died() -> None:
    """A form that ends the process that compiles is refused, again without any work, and the next one is compiled."""
    tokenizer = byte_tokenizer()
    compiler = FormCompiler(tokenizer.backend_tokenizer.to_str(), VOCABULARY, [tokenizer.eos_token_id])
    deep = "start: a0\n" + "\n".join(f'a{n}: "x" a{n + 1}' for n in range(9000)) + '\na9000: "y"'
    try:
        assert not compiler.matcher('start: "a"').is_error()
        for _ in range(2):
            with pytest.raises(ValueError, match="too deeply"):
                compiler.matcher(deep)
        assert not compiler.matcher('start: "b"').is_error()
    finally:
        compiler.close()
