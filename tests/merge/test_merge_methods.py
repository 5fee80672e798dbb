"""The merge methods: entries against hand-made examples and PEFT's code, spaces against dense matrices, determinism."""

import math
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from adapterhub_local.cli.merge import command as merge_command
from adapterhub_local.errors import InputError
from adapterhub_local.lora.adapter import Delta, open_adapter
from adapterhub_local.merge import entries
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.merge import merge_to_path
from adapterhub_local.merge.methods import METHODS, parameters
from adapterhub_local.merge.plan import make_plan
from adapterhub_local.merge.rank_rule import RankRule
from adapterhub_local.merge.report import MergeReport
from adapterhub_local.merge.space import merge_aligned, merge_in_core, merge_whole
from adapterhub_local.registry import Registry
from tests.merges import MODULES, SIZES, dense, dense_sum, frobenius, gap, save_adapter

ENTRYWISE = sorted(name for name, row in METHODS.items() if row.elementwise is not None)
TIES = {"density": 0.4, "scale": 1.0, "variant": "mergekit"}


def stack(*seeds: int, size: tuple[int, int] = (6, 9)) -> torch.Tensor:
    """Random matrices in float64."""
    return torch.stack(
        [torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    )


def draws(*seeds: int) -> list[torch.Generator]:
    """Generators."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def deltas(*seeds: int, rank: int = 3, size_in: int = 40, size_out: int = 30) -> list[Delta]:
    """Random deltas in float64."""
    made = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(rank, size_in, generator=generator, dtype=torch.float64)
        B = torch.randn(size_out, rank, generator=generator, dtype=torch.float64)
        made.append(Delta(A, B, 0.5 + seed))
    return made


def rotate(delta: Delta, seed: int) -> Delta:
    """The same delta, factored otherwise: (B G)(G^-1 A)."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(delta.rank, delta.rank, generator=generator, dtype=torch.float64)
    G += 3 * torch.eye(delta.rank, dtype=torch.float64)
    return Delta(torch.linalg.solve(G, delta.A), delta.B @ G, delta.scaling)


def run(paths: list[Path], weights: list[float], target: Path, method: str, **more: Any) -> MergeReport:
    """Merge files into a file by a method; `space`, `rule` and `dtype` are the formula's, the rest parameters."""
    own = {key: more.pop(key) for key in ("space", "rule", "dtype", "compact") if key in more}
    plan = make_plan([str(path) for path in paths], weights, Registry(), formula=Formula(method, more, **own))
    return merge_to_path(plan, target)


def test_trim_keeps_the_largest_and_of_equal_ones_the_first() -> None:
    """int(density n) entries stay as they are, one at least, whatever is equal."""
    matrix = torch.tensor([[1.0, -3.0, 2.0], [2.0, -2.0, 0.5]])
    assert entries.trim(matrix, 0.5).tolist() == [[0, -3, 2], [2, 0, 0]]
    assert entries.trim(matrix, 1.0).equal(matrix)
    assert int((entries.trim(matrix, 0.01) != 0).sum()) == 1
    assert int((entries.trim(torch.ones(7, 11), 0.3) != 0).sum()) == 23


def test_the_two_elections_differ_as_their_authors_wrote_them() -> None:
    """Weights 1 and 10 on +3 and -2: PEFT elects before weighting and gives +3, mergekit after it and gives -2."""
    pair = torch.tensor([[[3.0]], [[-2.0]]])
    assert entries.elect(pair, [1, 10], "peft").item() == 3
    assert entries.elect(pair, [1, 10], "mergekit").item() == -2
    agreeing = torch.tensor([[[3.0]], [[1.0]]])
    assert entries.elect(agreeing, [1, 3], "peft").item() == 3
    assert entries.elect(agreeing, [1, 3], "mergekit").item() == 1.5
    for variant in ("peft", "mergekit"):
        assert entries.elect(agreeing, [1, 1], variant).item() == 2
        assert entries.elect(torch.zeros(2, 1, 1), [1, 1], variant).item() == 0


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_in_the_peft_variant_is_pefts(density: float) -> None:
    """On the same matrices PEFT's own function gives the same, to the bit."""
    from peft.utils.merge_utils import magnitude_prune, ties

    matrices = stack(1, 2, 3)
    weights = [0.7, -0.3, 1.1]
    parameters = {"density": density, "scale": 1.0, "variant": "peft"}
    wanted = ties(list(matrices), torch.tensor(weights, dtype=torch.float64), density)
    torch.testing.assert_close(entries.ties(matrices, weights, parameters, ()), wanted)
    wanted = magnitude_prune(list(matrices), torch.tensor(weights, dtype=torch.float64), density)
    torch.testing.assert_close(entries.magnitude_prune(matrices, weights, parameters, ()), wanted)


def test_dropping_keeps_the_mean() -> None:
    """Over many draws the mean is the matrix, and the share of kept entries the density."""
    matrix = stack(1, size=(20, 30))[0]
    drawn = torch.stack([entries.drop(matrix, 0.4, draw) for draw in draws(*range(2000))])
    assert float((drawn != 0).double().mean()) == pytest.approx(0.4, rel=0.01)
    assert float((drawn.mean(dim=0) - matrix).norm() / matrix.norm()) < 0.05


def test_della_keeps_large_entries_more_often() -> None:
    """The probability rises from density - epsilon/2 to density + epsilon/2 along a row's ranks, and the mean stays."""
    row = torch.arange(1.0, 12.0, dtype=torch.float64).expand(2000, 11)
    parameters = {"density": 0.5, "epsilon": 0.4, "scale": 1.0, "variant": "mergekit"}
    made = entries.della(row[None], [1.0], parameters, draws(0))
    shares = (made != 0).double().mean(dim=0)
    assert float(shares[0]) == pytest.approx(0.3, abs=0.04)
    assert float(shares[-1]) == pytest.approx(0.7, abs=0.04)
    assert float(made.mean() / row.mean()) == pytest.approx(1, rel=0.02)


def test_breadcrumbs_leave_out_the_largest_and_the_smallest() -> None:
    """Of ten entries with gamma 0.2 and density 0.5, the two largest and the three smallest go."""
    matrix = torch.arange(1.0, 11.0).view(1, 2, 5)
    made = entries.breadcrumbs(matrix, [2.0], {"density": 0.5, "gamma": 0.2, "scale": 1.0}, ())
    assert made.flatten().tolist() == [0, 0, 0, 8, 10, 12, 14, 16, 0, 0]


@pytest.mark.parametrize("space", [merge_in_core, merge_aligned])
def test_merging_is_unchanged_when_a_factorisation_is_rotated(space: Any) -> None:
    """TIES of B A and of (B G)(G^-1 A) is the same matrix, which it is not on factors."""
    given = deltas(1, 2)

    def merge(cores: torch.Tensor) -> torch.Tensor:
        return entries.ties(cores, [0.7, 0.3], TIES, ())

    one = space(given, merge).dense()
    two = space([rotate(delta, seed) for seed, delta in enumerate(given)], merge).dense()
    assert float((one - two).norm() / one.norm()) < 1e-6
    assert float((one - sum(d.dense() for d in given)).norm()) > 0.01 * float(one.norm())


@pytest.mark.parametrize("space", [merge_in_core, merge_aligned])
def test_spaces_lose_nothing(space: Any) -> None:
    """A plain sum taken there is the sum of the deltas, of rank R at most, also where they share a subspace."""
    given = deltas(1, 2, 3)
    shared = [*given, Delta(given[0].A, -given[1].B, 2.0)]
    for some in (given, shared, given[:1]):
        made = space(some, lambda cores: cores.sum(dim=0))
        wanted = torch.stack([delta.dense() for delta in some]).sum(dim=0)
        torch.testing.assert_close(made.dense(), wanted, atol=1e-10, rtol=1e-10)
        assert made.rank <= sum(delta.rank for delta in some)
    assert merge_in_core(shared, lambda cores: cores.sum(dim=0)).rank <= 9


def test_whole_matrices_are_decomposed_nearly_optimally() -> None:
    """A large sparse matrix of full rank: the randomised rank-8 is near the best one, and its loss is exact."""
    given = deltas(1, 2, size_in=700, size_out=600)

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        return entries.ties(matrices, [1, 1], TIES, ())

    matrix = merge(torch.stack([delta.dense().float() for delta in given]))
    best = torch.linalg.svdvals(matrix)[8:].square().sum().sqrt()
    spectrum = merge_whole(given, merge, 8, torch.Generator().manual_seed(0))
    left = float((spectrum.truncate(8).dense() - matrix).norm())
    assert left == pytest.approx(float(best), rel=0.01)
    assert math.sqrt(spectrum.lost(8)) == pytest.approx(left, rel=1e-4)


@pytest.mark.parametrize("space", ["core", "full"])
@pytest.mark.parametrize("method", [name for name in ENTRYWISE if name != "knots"])
def test_every_method_reports_the_loss_of_what_it_wrote(tmp_path: Path, method: str, space: str) -> None:
    """Files of several ranks and modules: finite, the reported error that against the method's own dense result."""
    paths = [save_adapter(tmp_path / "a", 1), save_adapter(tmp_path / "b", 2, ranks={MODULES[0]: 3, MODULES[1]: 1})]
    report = run(paths, [0.7, 0.3], tmp_path / "m.safetensors", method, space=space)
    made = dense(open_adapter(tmp_path / "m.safetensors"))
    assert set(made) == set(SIZES)
    assert all(torch.isfinite(delta).all() for delta in made.values())
    assert (report.relative_error < 1e-6) is (space == "core")
    assert math.sqrt(max(0, 1 - report.relative_error**2)) * report.norm == pytest.approx(frobenius(made), rel=1e-4)
    assert report.formula["method"] == method
    assert report.formula["space"] == space


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della"])
def test_draws_depend_on_seed_adapter_and_module_only(tmp_path: Path, method: str) -> None:
    """The order of the adapters does not matter, another seed does, the same seed gives the same bytes."""
    a, b = save_adapter(tmp_path / "a", 1), save_adapter(tmp_path / "b", 2)
    files = {}
    for name, paths, weights, seed in (
        ("one", [a, b], [0.7, 0.3], 1),
        ("again", [a, b], [0.7, 0.3], 1),
        ("turned", [b, a], [0.3, 0.7], 1),
        ("other", [a, b], [0.7, 0.3], 2),
    ):
        files[name] = tmp_path / f"{name}.safetensors"
        run(paths, weights, files[name], method, seed=seed, space="full", rule=RankRule("lossless"))
    made = {name: dense(open_adapter(path)) for name, path in files.items()}
    assert files["one"].read_bytes() == files["again"].read_bytes()
    assert gap(made["one"], made["turned"]) < 1e-5 * frobenius(made["one"])
    assert gap(made["one"], made["other"]) > 0.1 * frobenius(made["one"])


def test_linear_methods_are_sums(tmp_path: Path) -> None:
    """Average, task arithmetic and SLERP are exact sums with other coefficients; SLERP keeps the length."""
    a, b = save_adapter(tmp_path / "a", 1), save_adapter(tmp_path / "b", 2)
    for method, given, weights, same in (
        ("weighted_average", {}, [3.0, 1.0], [0.75, 0.25]),
        ("task_arithmetic", {"scale": 0.5}, [1.0, -1.0], [0.5, -0.5]),
        ("slerp", {}, [1.0, 0.0], [1.0, 0.0]),
    ):
        run([a, b], weights, tmp_path / f"{method}.safetensors", method, **given)
        assert gap(dense(open_adapter(tmp_path / f"{method}.safetensors")), dense_sum([a, b], same)) < 1e-5
    report = run([a, b], [1, 3], tmp_path / "s.safetensors", "slerp")
    made, one, two = (dense(open_adapter(path)) for path in (tmp_path / "s.safetensors", a, b))
    assert report.relative_error < 1e-6
    for module in SIZES:
        x, y, z = (deltas[module].flatten() for deltas in (one, two, made))
        theta = math.acos(float(x @ y / x.norm() / y.norm()))
        wanted = (math.sin(theta / 4) * x + math.sin(3 * theta / 4) * y) / math.sin(theta)
        torch.testing.assert_close(z, wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_merge_of_an_adapter_with_itself_is_itself(tmp_path: Path, method: str) -> None:
    """Averaging methods at full density give an adapter back from itself twice, whatever the factorisation."""
    path = save_adapter(tmp_path / "a", 1)
    row = METHODS[method]
    full = {"density": 1.0, "gamma": 0.0, "epsilon": 1e-6}
    given = {name: value for name, value in full.items() if name in row.parameters}
    if method == "della":
        given = {"density": 1 - 5e-7, "epsilon": 1e-6}
    weights = [0.5, 0.5]
    run([path, path], weights, tmp_path / "m.safetensors", method, **given)
    truth = dense(open_adapter(path))
    assert gap(dense(open_adapter(tmp_path / "m.safetensors")), truth) < 1e-5 * frobenius(truth)


@pytest.mark.parametrize(
    ("method", "given", "weights", "told"),
    [
        ("tis", {}, [1, 1], "did you mean ties"),
        ("zzz", {}, [1, 1], "there are weighted_sum"),
        ("weighted_sum", {"density": 0.5}, [1, 1], "weighted_sum has no parameter 'density'"),
        ("slerp", {"density": 0.5}, [1, 1], "takes no parameters"),
        ("ties", {"seed": 1}, [1, 1], "it takes density, scale, variant"),
        ("ties", {"density": 0.0}, [1, 1], "above 0 up to 1"),
        ("ties", {"density": 1.5}, [1, 1], "above 0 up to 1"),
        ("ties", {"density": math.nan}, [1, 1], "finite"),
        ("ties", {"density": "half"}, [1, 1], "finite"),
        ("ties", {"variant": "mine"}, [1, 1], "use mergekit or peft"),
        ("dare_ties", {"seed": -1}, [1, 1], "from 0"),
        ("della", {"density": 0.95}, [1, 1], "0.85 to 1.05"),
        ("breadcrumbs", {"gamma": 0.5}, [1, 1], "more than all entries"),
        ("slerp", {}, [1, -1], "not negative"),
        ("slerp", {}, [1, 1, 1], "between two adapters"),
        ("weighted_average", {}, [1, -1], "sum to 0"),
        ("ties", {"space": "dense"}, [1, 1], "use core or full"),
        ("knots", {"space": "core"}, [1, 1], "use aligned"),
        ("weighted_sum", {"space": "core"}, [1, 1], "on the factors themselves"),
    ],
)
def test_what_a_method_does_not_take_is_refused(
    method: str, given: dict[str, Any], weights: list[float], told: str
) -> None:
    """The message names the method or the parameter and what it may be."""
    space = given.pop("space", None)
    with pytest.raises(InputError, match=told):
        Formula(method, given, space).check(weights)


def test_the_command_line_is_built_from_the_table() -> None:
    """`qhub merge --help` names every method, has an option for every parameter, and shows the table's defaults."""
    options = {option.name: option for option in merge_command.params}
    context = click.Context(merge_command)
    assert all(method in str(options["method"].get_help_record(context)) for method in METHODS)
    for name, rows in parameters().items():
        record = options[name].get_help_record(context)
        assert record is not None
        for method, row in rows.items():
            assert row.help in record[1]
            shown = record[1].split("Default: ")[1].rstrip(".").split("; ")
            (part,) = (part for part in shown if f" {method}," in f"{part},")
            assert part.startswith(f"{row.default} for ")


def test_a_parameter_has_one_kind_and_one_meaning_for_all_methods() -> None:
    """Methods may give a parameter of one name other defaults, not another kind or help; a plan file reads it alike."""
    for name, rows in parameters().items():
        assert len({(row.kind, row.help, row.choices) for row in rows.values()}) == 1, name


def test_every_row_has_its_paper_and_its_function() -> None:
    """A method is linear, or names a function of `entries` that is there."""
    assert all(row.paper.startswith("https://") for row in METHODS.values())
    assert all((row.linear is None) is not (row.elementwise is None) for row in METHODS.values())
    assert all(callable(row.on_entries()) for row in METHODS.values() if row.elementwise)
