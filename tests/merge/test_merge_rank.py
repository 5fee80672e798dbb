"""Reducing the rank of a merge: optimal, canonical, lossless where nothing is lost, and its loss known before."""

import math
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.cli.merge import command
from adapterhub_local.errors import InputError
from adapterhub_local.lora.adapter import Delta, open_adapter
from adapterhub_local.lora.config import CONFIG
from adapterhub_local.merge.algebra import decompose, distance, norm, rounding
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.merge import dry_run, merge_to_path
from adapterhub_local.merge.plan import make_plan
from adapterhub_local.merge.rank import check_kept
from adapterhub_local.merge.rank_rule import RankRule, parse_rule
from adapterhub_local.merge.report import MergeReport
from adapterhub_local.registry import Registry
from tests.merges import MODULES, SIZES, adapters, dense, dense_sum, frobenius, gap, quick, save_adapter


def run(paths: list[Path], weights: list[float], target: Path, **formula: Any) -> MergeReport:
    """Merge files into a file by a formula."""
    plan = make_plan([str(path) for path in paths], weights, Registry(), formula=Formula(**formula))
    return merge_to_path(plan, target)


def random_delta(seed: int, rank: int = 4, size_in: int = 30, size_out: int = 20) -> Delta:
    """A delta in float64."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, size_in, generator=generator, dtype=torch.float64)
    return Delta(A, torch.randn(size_out, rank, generator=generator, dtype=torch.float64), 1.5)


@quick
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9))
def test_truncation_is_that_of_the_dense_decomposition(seed: int, rank: int, kept: int) -> None:
    """Singular values and the nearest delta of a rank equal the dense SVD's, and the loss is what was predicted."""
    delta = random_delta(seed, rank, 7, 5)
    values = torch.linalg.svdvals(delta.dense())
    spectrum = decompose(delta)
    found = spectrum.values[: len(values)]
    torch.testing.assert_close(found, values[: len(found)], atol=1e-12 * float(values[0]), rtol=1e-10)
    near = spectrum.truncate(kept)
    best = math.sqrt(float(values[kept:].square().sum()))
    assert distance(near, delta) == pytest.approx(best, abs=1e-9 * norm(delta))
    assert math.sqrt(spectrum.lost(kept)) == pytest.approx(best, abs=1e-9 * norm(delta))


def test_signs_do_not_depend_on_the_factorisation() -> None:
    """U and V are the same for B A and for (B G)(G^-1 A), with the largest entry of each column of U positive."""
    delta = random_delta(3)
    G = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turned = Delta(torch.linalg.solve(G, delta.A), delta.B @ G, delta.scaling)
    one, two = decompose(delta), decompose(turned)
    torch.testing.assert_close(one.U, two.U, atol=1e-9, rtol=0)
    torch.testing.assert_close(one.Vt, two.Vt, atol=1e-9, rtol=0)
    assert all(column[column.abs().argmax()] > 0 for column in one.U.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_the_distance_to_what_is_stored(dtype: torch.dtype) -> None:
    """The measured effect of a storage dtype is the dense one, to four digits."""
    exact = Delta(random_delta(5).A, random_delta(5).B, 1.0)
    stored = Delta(exact.A.to(dtype), exact.B.to(dtype), 1.0)
    wanted = float((stored.B.double() @ stored.A.double() - exact.dense()).norm())
    assert rounding(stored, exact) == pytest.approx(wanted, rel=1e-4)
    assert rounding(stored, Delta(stored.A.double(), stored.B.double(), 1.0)) == 0


RULES = st.sampled_from(
    [
        *(RankRule("rank", 1), RankRule("rank", 2), RankRule("energy", 0.9), RankRule("energy", 0.999)),
        *(RankRule("max_error", 0.3), RankRule("max_error", 0.01), RankRule("lossless")),
    ]
)


@quick
@given(st.lists(adapters(), min_size=1, max_size=3), RULES, st.booleans())
def test_the_predicted_loss_is_the_measured_one(
    tmp_path: Path, parents: list[dict[str, Any]], rule: RankRule, compact: bool
) -> None:
    """Over random merges the report's error is that of dense matrices, as predicted to 1e-5, and as asked for."""
    folder = Path(mkdtemp(dir=tmp_path))
    paths = [save_adapter(folder / f"a{index}", **arguments) for index, arguments in enumerate(parents)]
    weights = [1.0, 0.5, 0.3][: len(paths)]
    plan = make_plan([str(path) for path in paths], weights, Registry())
    if rule.kind == "rank" and rule.value > plan.largest_rank:
        return
    report = run(paths, weights, folder / "out.safetensors", rule=rule, compact=compact, dtype="float32")
    truth = dense_sum(paths, weights)
    error = gap(dense(open_adapter(folder / "out.safetensors")), truth) / frobenius(truth)
    assert report.relative_error == pytest.approx(error, rel=1e-3, abs=2e-6)
    assert report.truncation_error == pytest.approx(error, abs=1e-5)
    if rule.kind == "energy":
        assert report.retained_energy >= rule.value - 1e-6
    if rule.kind == "max_error":
        assert report.relative_error <= rule.value + 1e-6
    if rule.kind == "lossless":
        assert report.relative_error < 2e-6
    if rule.kind == "rank":
        budget = sum(int(rule.value) * (s.in_features + s.out_features) for s in plan.shapes.values())
        assert report.num_parameters <= budget
    assert len(report.modules) == report.num_modules == len(truth)
    for one in report.modules:
        size = float(truth[one["module"]].norm())
        assert one["norm"] == pytest.approx(size, rel=1e-5, abs=1e-9)


def test_adapters_that_share_a_subspace_lose_no_rank_for_nothing(tmp_path: Path) -> None:
    """Three times the same adapter, and an adapter with its own merge, have the rank of one; nothing is lost."""
    a = save_adapter(tmp_path / "a", 1)
    half = tmp_path / "half.safetensors"
    run([a], [0.37], half)
    for paths, weights in (([a, a, a], [0.5, 0.2, 1.0]), ([a, half], [1.0, 1.0])):
        target = tmp_path / f"{len(paths)}.safetensors"
        report = run(paths, weights, target, rule=RankRule("lossless"))
        assert report.rank == 2
        assert report.exact_rank == 2 * len(paths)
        assert gap(dense(open_adapter(target)), dense_sum(paths, weights)) < 1e-6 * report.norm


def test_a_budget_over_modules_keeps_more_than_one_rank_for_all(tmp_path: Path) -> None:
    """With ranks of their own the modules keep more energy with no more parameters; PEFT's patterns say which."""
    a = save_adapter(tmp_path / "a", 1, ranks={MODULES[0]: 5, MODULES[1]: 1, MODULES[2]: 3})
    b = save_adapter(tmp_path / "b", 2, ranks={MODULES[0]: 2}, alpha=40)
    uniform = run([a, b], [1, 1], tmp_path / "u.safetensors", rule=RankRule("rank", 2))
    pooled = run([a, b], [1, 1], tmp_path / "p.safetensors", rule=RankRule("rank", 2), compact=True)
    assert pooled.num_parameters <= uniform.num_parameters
    assert pooled.relative_error < uniform.relative_error
    ranks = {shape.rank for shape in open_adapter(tmp_path / "p.safetensors").shapes.values()}
    assert len(ranks) > 1
    assert {shape.rank for shape in open_adapter(tmp_path / "u.safetensors").shapes.values()} == {2}


@pytest.mark.parametrize(
    ("given", "stored"),
    [(torch.float16, "float16"), (torch.bfloat16, "float16"), (torch.float32, "float32")],
)
def test_storage_follows_what_came_in(tmp_path: Path, given: torch.dtype, stored: str) -> None:
    """16-bit adapters reduced in rank are stored in the better of the 16-bit dtypes; exact merges in float32."""
    paths = [save_adapter(tmp_path / f"{seed}", seed, dtype=given) for seed in (1, 2)]
    assert run(paths, [0.7, 0.3], tmp_path / "r.safetensors", rule=RankRule("rank", 2)).dtype == stored
    exact = run(paths, [0.7, 0.3], tmp_path / "e.safetensors")
    assert (exact.dtype, exact.relative_error < 1e-6) == ("float32", True)


def test_a_range_too_small_for_float16_is_bfloat16(tmp_path: Path) -> None:
    """Factors beyond 65504 go to bfloat16 by themselves, and are refused where float16 is asked for."""
    paths = [save_adapter(tmp_path / f"{seed}", seed, dtype=torch.bfloat16, alpha=1e11) for seed in (1, 2)]
    assert run(paths, [1, 1], tmp_path / "r.safetensors", rule=RankRule("rank", 2)).dtype == "bfloat16"
    with pytest.raises(InputError, match="too large"):
        run(paths, [1, 1], tmp_path / "f.safetensors", dtype="float16")
    assert not (tmp_path / "f.safetensors").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_effect_of_the_storage_dtype_is_reported(tmp_path: Path, dtype: str) -> None:
    """The rounding error of the report is that of the file."""
    paths = [save_adapter(tmp_path / f"{seed}", seed) for seed in (1, 2)]
    report = run(paths, [0.7, 0.3], tmp_path / "out.safetensors", dtype=dtype)
    truth = dense_sum(paths, [0.7, 0.3])
    error = gap(dense(open_adapter(tmp_path / "out.safetensors")), truth) / frobenius(truth)
    assert report.rounding_error == pytest.approx(error, rel=1e-3)
    assert 1e-5 < error < 1e-2


def test_the_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    """One thread or three, and the process's own setting is as before."""
    paths = [
        save_adapter(tmp_path / f"{seed}", seed, sizes={MODULES[0]: (600, 700)}, ranks={MODULES[0]: 16})
        for seed in (1, 2)
    ]
    before, files = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for number, rule in enumerate((RankRule(), RankRule("rank", 8))):
                run(paths, [0.7, 0.3], tmp_path / f"{threads}-{number}.safetensors", rule=rule)
            assert torch.get_num_threads() == threads
            files.append([(tmp_path / f"{threads}-{number}.safetensors").read_bytes() for number in range(2)])
    finally:
        torch.set_num_threads(before)
    assert files[0] == files[1]


def test_interference_is_the_cosine_of_the_deltas(tmp_path: Path) -> None:
    """Over all modules and for each, from the factors; an adapter and its double point the same way."""
    a, b = save_adapter(tmp_path / "a", 1), save_adapter(tmp_path / "b", 2, ranks={MODULES[0]: 3})
    plan = make_plan([str(a), str(b), str(a)], [1, 0.5, 2], Registry())
    report = dry_run(plan)
    left, right = dense(open_adapter(a)), dense(open_adapter(b))
    cosine = float((left[MODULES[0]] * right[MODULES[0]]).sum()) / frobenius(left) / frobenius(right)
    found = {tuple(entry["pair"]): entry["cosine"] for entry in report.interference}
    assert found["a.safetensors", "b.safetensors"] == pytest.approx(cosine)
    assert found["a.safetensors", "a.safetensors"] == pytest.approx(1.0)
    modules = {one["module"]: one["cosine"] for one in report.modules}
    assert modules[MODULES[1]] == [None, pytest.approx(1.0), None]


def test_a_dry_run_reports_what_the_merge_will(tmp_path: Path) -> None:
    """The same report, nothing written."""
    paths = [save_adapter(tmp_path / f"{seed}", seed) for seed in (1, 2)]
    before = set(tmp_path.rglob("*"))
    plan = make_plan(
        [str(path) for path in paths], [0.7, 0.3], Registry(), formula=Formula(rule=RankRule("energy", 0.9))
    )
    report = dry_run(plan)
    assert set(tmp_path.rglob("*")) == before
    assert merge_to_path(plan, tmp_path / "out").to_json() == report.to_json()
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[0] == CONFIG


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("0",), "rank is '0'"),
        (("-1",), "rank is '-1'"),
        (("1.5",), "rank is '1.5'"),
        (("full",), "rank is 'full'"),
        (("²",), "rank is"),
        (("9" * 30,), "rank is"),
        ((None, 0.0), "energy is 0"),
        ((None, 1.1), "energy is 1.1"),
        ((None, math.nan), "energy is nan"),
        ((None, None, 1.0), "max_error is 1"),
        ((None, None, math.nan), "max_error is nan"),
        (("3", 0.5), "rank and energy exclude each other"),
    ],
)
def test_rules_that_make_no_sense_are_refused(arguments: tuple, told: str) -> None:
    """The message names the option and what it may be."""
    with pytest.raises(InputError, match=told):
        parse_rule(*arguments)


def test_a_rank_larger_than_possible_is_refused(tmp_path: Path) -> None:
    """Before anything is written, with the rank that is there."""
    a = save_adapter(tmp_path / "a", 1)
    with pytest.raises(InputError, match="more than this merge has: its modules have rank 2"):
        run([a], [1.0], tmp_path / "out.safetensors", rule=RankRule("rank", 3))
    with pytest.raises(InputError, match="use one of auto, float32"):
        run([a], [1.0], tmp_path / "out.safetensors", dtype="float8")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_loss_larger_than_asked_for_is_never_stored_silently() -> None:
    """Where the largest rank that is stored keeps too little, the rule is refused; rank and exact ask for nothing."""
    for rule in (RankRule("energy", 0.9), RankRule("max_error", 0.3), RankRule("lossless")):
        with pytest.raises(InputError, match=r"keeps 80\.00% of energy"):
            check_kept(rule, 0.2, 1.0, 512)
    for rule in (RankRule("rank", 3), RankRule(), RankRule("energy", 0.8), RankRule("max_error", 0.5)):
        check_kept(rule, 0.2, 1.0, 512)


def test_the_rank_a_server_needs_is_reported() -> None:
    """The least --max-lora-rank vLLM has for it, or none above 512."""
    report = MergeReport({}, 33, 33, 1, 1, "float32")
    assert report.server_rank == 64
    report.rank = 513
    assert report.server_rank is None


def test_a_budget_chooses_the_rank(tmp_path: Path) -> None:
    """The file fits in the budget and one rank more would not; where not all is kept, a note says so."""
    paths = [save_adapter(tmp_path / name, seed, ranks=dict.fromkeys(SIZES, 3)) for seed, name in enumerate("abc")]
    one = 4 * sum(sum(sizes) for sizes in SIZES.values())
    for budget, rank in ((2 * one, 2), (3 * one - 1, 2), (9 * one, 9), (one, 1)):
        plan = make_plan(
            [str(path) for path in paths],
            [1, 1, 1],
            Registry(),
            formula=Formula(rule=parse_rule(None, None, None, f"{budget}B")),
        )
        report = merge_to_path(plan, tmp_path / f"{budget}.safetensors")
        assert (report.rank, report.num_parameters * 4 <= budget) == (rank, True)
        assert any("is kept" in note for note in report.notes) is (rank < 9)
    half = Formula(rule=RankRule("size", 4 * one), dtype="float16")
    assert make_plan([str(path) for path in paths], [1, 1, 1], Registry(), formula=half).formula.rule.value == 8
    with pytest.raises(InputError, match=r"max_size is 10B, but rank 1 takes 224 bytes already"):
        make_plan([str(path) for path in paths], [1, 1, 1], Registry(), formula=Formula(rule=RankRule("size", 10)))


def test_a_merge_of_many_picks_a_rank_that_a_server_takes(tmp_path: Path) -> None:
    """Fifty adapters with a sum of rank 800: by itself 512 is kept, with its error and a note; exact keeps all."""
    sizes = {"model.layers.0.mlp.up_proj": (1024, 1024)}
    ranks = dict.fromkeys(sizes, 16)
    paths = [str(save_adapter(tmp_path / f"a{n}", n, ranks=ranks, sizes=sizes)) for n in range(50)]
    plan = make_plan(paths, [1 / 50] * 50, Registry(), formula=Formula(rule=parse_rule(None)))
    assert (plan.rank, str(plan.formula.rule)) == (800, "rank 512")
    assert "rank 512 of 800 is kept: servers take no larger one; --rank exact keeps all" in plan.notes[-1]
    report = merge_to_path(plan, tmp_path / "all.safetensors")
    assert (report.rank, report.server_rank) == (512, 512)
    assert 0 < report.relative_error == pytest.approx(report.truncation_error, rel=1e-3)
    few = make_plan(paths[:32], [1] * 32, Registry(), formula=Formula(rule=parse_rule(None)))
    assert (few.formula.rule, few.notes) == (RankRule("exact"), ())
    assert make_plan(paths, [1] * 50, Registry(), formula=Formula(rule=parse_rule("exact"))).rank == 800


def test_a_merge_of_many_in_small_modules_keeps_all_by_itself(tmp_path: Path) -> None:
    """Where modules have fewer dimensions than the sum has ranks, nothing is lost, and the note says so."""
    sizes = {"model.layers.0.mlp.up_proj": (64, 48)}
    ranks = dict.fromkeys(sizes, 16)
    paths = [str(save_adapter(tmp_path / f"a{n}", n, ranks=ranks, sizes=sizes)) for n in range(33)]
    plan = make_plan(paths, [1.0] * 33, Registry(), formula=Formula(rule=parse_rule(None)))
    assert plan.notes == ("rank 48 keeps all of the sum's 528: no module has more",)
    report = merge_to_path(plan, tmp_path / "all.safetensors")
    assert (report.rank, report.server_rank) == (48, 64)
    assert report.relative_error < 1e-6
    exact = CliRunner().invoke(command, [*paths, "--weights", ",".join(["1"] * 33), "--rank", "exact", "--dry-run"])
    assert "--rank auto keeps what fits" in exact.output
    assert "--rank 512" not in exact.output  # which would be refused
