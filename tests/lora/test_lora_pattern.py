"""Patterns of a stranger's config: they mean what they mean to PEFT, in linear time, or they are refused."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_local.errors import BadFile
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.lora.config import AdapterConfig
from adapterhub_local.lora.config_reader import parse_config
from adapterhub_local.lora.loadable import loadable
from adapterhub_local.lora.pattern import MAX_PATTERNS, PatternTable, compile_pattern, matches_whole
from tests.adapter_files import Q, factors, save_peft
from tests.patience import ends

NAMES = [Q, "model.layers.10.self_attn.q_proj", "lm_head", "model.layers.1.mlp.up_proj", "q_proj", "a.b-c.d"]
PATTERNS = [
    *("q_proj", Q, f"^{Q}"), "self_attn.q_proj$", r"layers\.1\.mlp\.up_proj", "lm_head", "q.proj", "[kq]_proj",
    "(q|v)_proj", ".*", "", "layers.1..self_attn.q_proj", "proj", r"b\-c.d", "^q_proj$", "$", "^", r"\d+\.mlp\.up_proj",
    "q_proj|lm_head", "(?i:Q)_proj", r".*\.layers\.\d{2}\..*", r"\bq_proj", r"[^.]+", r"(?P<part>q)_proj",
]  # fmt: skip


def as_peft(patterns: dict[str, int], name: str) -> int | None:
    """What PEFT's `get_pattern_key` finds."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), None)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(PATTERNS), st.integers(), max_size=4), st.sampled_from(NAMES))
def test_patterns_match_what_they_match_in_peft(patterns: dict[str, int], name: str) -> None:
    """Names are looked up and other patterns matched, in their order, with the outcome that PEFT has."""
    assert PatternTable(patterns).get(name, None) == as_peft(patterns, name)


def test_lookahead_that_ms_swift_writes_is_read() -> None:
    """A lookahead for one letter before `.*` asks for what the letter itself asks for."""
    pattern = r"^(model\.language_model(?=\.).*\.(q_proj|k_proj))$"
    for name in ("model.language_model.layers.0.q_proj", "model.language_modelx.q_proj", "model.language_model.x"):
        assert matches_whole(pattern, name) is bool(re.fullmatch(pattern, name))


HOSTILE: dict[str, tuple[str, str]] = {  # name -> pattern, reason
    "5,000 deep": ("(" * 4_999 + "a" + ")" * 4_999, "more than 100 deep"),
    "too long": ("a" * 20_000, "20,000 characters"),
    "huge repeats": ("(((a{0,60000}){0,60000}){0,60000})", "repetition"),
    "repeats of repeats": ("(a{1000}){1000}", "repetition"),
    "lookahead": ("(?=x)y", "(?="),
    "lookbehind": ("(?<!x)y", "(?<"),
    "back reference": (r"(a)\1", r"\1"),
    "possessive": ("a++", "++"),
    "atomic": ("(?>a)", "(?>"),
    "POSIX class": ("[[:alpha:]]", "spell it out"),
    "open repeat": ("a{,5}", "spell it out"),
    "unclosed": ("(", "not a regular expression"),
    "only RE2 knows it": (r"\pN", "not a regular expression"),
    "half a character": ("\ud800", "not a regular expression"),
}
SLOW = ["([a-z._0-9]+)+!", "(.*)*x", "(a|a)*b", "(([a-z._0-9]+)*)*!", ".*.*.*.*.*.*.*.*.*.*=", "(?:[^!]*[^!]*)*!"]


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("case", HOSTILE)
def test_pattern_that_cannot_be_matched_is_refused(tmp_path: Path, case: str, setting: str) -> None:
    """Each of the four settings refuses what is not linear, with the reason and at once."""
    pattern, reason = HOSTILE[case]
    value: Any = pattern if setting.endswith("modules") else {pattern: 2}
    folder = save_peft(tmp_path / "a", factors({Q: (8, 6, 2)}), **{setting: value})
    with ends(), pytest.raises(BadFile) as caught:
        open_adapter(folder)
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("pattern", SLOW)
def test_pattern_that_would_backtrack_is_matched_at_once(tmp_path: Path, pattern: str) -> None:
    """What keeps Python's engine busy forever takes no time here, and PEFT is given names in its place."""
    settings: dict[str, Any] = {"alpha_pattern": {pattern: 8}, "rank_pattern": {pattern: 2}, "exclude_modules": pattern}
    folder = save_peft(tmp_path / "a", factors({Q: (8, 6, 2)}), **settings)
    with ends():
        adapter = open_adapter(folder)
        assert adapter.delta(Q).scaling == 2
        with loadable(folder) as place:
            assert open_adapter(place).config == AdapterConfig(2, 4, (Q,))


@pytest.mark.parametrize(
    "patterns",
    [
        {f"a{number}": 1 for number in range(MAX_PATTERNS + 1)},
        {f"a{number}.*": 1 for number in range(20_000)},
        {"(x|y)" * 1_900 + str(number): 1 for number in range(100)},
    ],
    ids=["names", "patterns", "long ones"],
)
def test_too_many_patterns_are_refused_at_once(patterns: dict[str, int]) -> None:
    """More patterns than any adapter has are not tried one by one."""
    with ends(), pytest.raises(ValueError, match="more than any adapter needs"):
        PatternTable(patterns)


def test_a_name_for_each_module_of_a_mixture_of_experts_is_looked_up() -> None:
    """Ten thousand names for ten thousand modules take less than a second or two, not ten thousand squared."""
    modules = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(80) for j in range(128)]
    config = AdapterConfig(2, 4, ("up_proj",), rank_pattern=dict.fromkeys(modules, 3))
    config.check_size(len(modules))
    with ends():
        assert all(config.rank_of(module) == 3 for module in modules)


def test_order_of_patterns_is_kept() -> None:
    """Of two patterns that match the first counts, and what is written, sorted, says the same of each module."""
    other = "model.layers.1.mlp.q_proj"
    config = AdapterConfig(2, 4, ("q_proj",), rank_pattern={"self_attn.q_proj": 8, "q_proj": 3, "mlp.q_proj": 9})
    assert (config.rank_of(Q), config.rank_of(other)) == (8, 3)
    written = parse_config(config.for_modules([Q, other]).to_bytes(), "here")
    assert (written.rank_of(Q), written.rank_of(other)) == (8, 3)


def test_compiled_patterns_are_kept() -> None:
    """The same pattern is compiled once."""
    assert compile_pattern("q_proj|v_proj") is compile_pattern("q_proj|v_proj")
