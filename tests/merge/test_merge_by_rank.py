"""The error of a merge at every rank, known before one is chosen, is that of the merge that is then made."""

import json
import re
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.cli.merge import command
from adapterhub_local.counts import thinned
from adapterhub_local.errors import InputError
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.merge.by_rank import errors_by_rank
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.merge import merge_to_path
from adapterhub_local.merge.plan import make_plan
from adapterhub_local.merge.rank_rule import RankRule
from adapterhub_local.registry import Registry
from tests.merges import SIZES, adapters, dense, frobenius, gap, quick, save_adapter

METHODS = {"weighted_sum": {}, "ties": {"density": 0.5}, "dare_ties": {"density": 0.6, "seed": 3}, "knots": {}}


@quick
@given(st.lists(adapters(), min_size=1, max_size=3), st.sampled_from(sorted(METHODS)), st.data())
def test_the_error_at_a_rank_is_that_of_a_real_merge(
    tmp_path: Path, parents: list[dict[str, Any]], method: str, data: st.DataObject
) -> None:
    """For random merges by several methods, cut to a rank and read back: dense matrices lose what was predicted."""
    folder = Path(mkdtemp(dir=tmp_path))
    paths = [str(save_adapter(folder / f"a{index}", **arguments)) for index, arguments in enumerate(parents)]
    weights = [1.0, 0.5, -0.3][: len(paths)]

    def merged(name: str, rule: RankRule) -> tuple[dict[str, Any], Any]:
        formula = Formula(method, METHODS[method], rule=rule, dtype="float32")
        report = merge_to_path(make_plan(paths, weights, Registry(), formula=formula), folder / name)
        return dense(open_adapter(folder / name)), report

    plan = make_plan(paths, weights, Registry(), formula=Formula(method, METHODS[method]))
    errors = errors_by_rank(plan)
    assert len(errors) == plan.largest_rank
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    truth, _ = merged("whole.safetensors", RankRule("exact"))
    rank = data.draw(st.integers(1, plan.largest_rank))
    made, report = merged("cut.safetensors", RankRule("rank", rank))
    assert errors[rank - 1] == pytest.approx(gap(made, truth) / (frobenius(truth) or 1), abs=1e-5)
    assert errors[rank - 1] == pytest.approx(report.truncation_error, abs=1e-7)


def test_the_command_prints_it_and_refuses_what_is_not_known(tmp_path: Path) -> None:
    """A dry run prints rank and error, as JSON all of them; without one, or in whole matrices, it says what to do."""
    paths = [str(save_adapter(tmp_path / f"a{seed}", seed, ranks=dict.fromkeys(SIZES, 3))) for seed in (1, 2)]
    words = [*paths, "--weights", "0.6,0.4", "--by-rank"]

    def run(*more: str) -> Any:
        return CliRunner().invoke(command, [*words, *more])

    found = json.loads(run("--dry-run", "--json", "--rank", "2").stdout)
    assert len(found["error_by_rank"]) == 6
    assert found["error_by_rank"][1] == pytest.approx(found["truncation_error"], abs=1e-9)
    table = dict(re.findall(r"^ *(\d) +(\S+) *$", run("--dry-run").stdout, re.MULTILINE))
    assert list(table) == ["1", "2", "3", "4", "5", "6"]
    assert float(table["2"]) == pytest.approx(found["error_by_rank"][1], rel=1e-3)
    for more, reason in (
        ((), "add --dry-run"),
        (("--dry-run", "--method", "ties", "--space", "full"), "in core space"),
    ):
        refused = run(*more)
        assert isinstance(refused.exception, InputError)
        assert reason in str(refused.exception)


def test_numbers_are_thinned_to_both_ends() -> None:
    """The first and the last are there, nothing twice, and no more than growth allows."""
    assert thinned(0, 2) == []
    assert thinned(1, 2) == [1]
    assert thinned(7, 1) == [1, 2, 3, 4, 5, 6, 7]
    assert thinned(1000, 2) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
    assert len(thinned(100_000, 1.25)) < 60
