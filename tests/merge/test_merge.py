"""Merging: the exact weighted sum against a dense float64 reference, refusals, and what PEFT makes of the result."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local import merge as library
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.errors import BadFile, BadReference, Incompatible, InputError, InUse, NotFound
from adapterhub_local.lora.adapter import Delta, open_adapter
from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.lora.header import read_header
from adapterhub_local.merge.algebra import distance, inner, norm, pad_rank, weighted_sum
from adapterhub_local.merge.merge import merge_to_path, merge_to_registry
from adapterhub_local.merge.plan import make_plan
from adapterhub_local.registry import Registry
from tests.merges import (
    FIRST,
    MODULES,
    SECOND,
    SIZES,
    WEIGHT,
    adapters,
    dense,
    dense_sum,
    frobenius,
    gap,
    quick,
    save_adapter,
)


def merge(paths: Sequence[Path | str], weights: Sequence[float], target: Path, **options: Any) -> Path:
    """Merge files into a file."""
    merge_to_path(make_plan([str(path) for path in paths], weights, Registry(), **options), target)
    return target


def is_nothing_written(folder: Path, before: set[Path]) -> bool:
    """Whether a refused merge left the folder as it was."""
    return set(folder.rglob("*")) == before


@quick
@given(st.lists(st.tuples(adapters(), WEIGHT), min_size=1, max_size=4), st.randoms())
def test_a_merge_is_the_dense_weighted_sum(
    tmp_path: Path, parents: list[tuple[dict[str, Any], float]], random: Any
) -> None:
    """Over random ranks, modules, signs, scalings and dtypes the error is rounding, and it is what is reported."""
    folder = Path(mkdtemp(dir=tmp_path))
    paths = [save_adapter(folder / f"a{index}", **arguments) for index, (arguments, _) in enumerate(parents)]
    weights = [weight for _, weight in parents]
    plan = make_plan([str(path) for path in paths], weights, Registry())
    report = merge_to_path(plan, folder / "merged.safetensors")
    merged = open_adapter(folder / "merged.safetensors")
    truth = dense_sum(paths, weights)
    terms = sum(abs(weight) * frobenius(dense(open_adapter(path))) for path, weight in zip(paths, weights, strict=True))
    error = gap(dense(merged), truth)
    assert error <= 1e-6 * terms
    assert report.norm == pytest.approx(frobenius(truth), rel=2e-6, abs=1e-9 * terms)
    assert report.kept <= 1 + 1e-9
    if report.kept > 1e-3:
        assert error <= 1e-6 * frobenius(truth) / report.kept
        assert report.relative_error == pytest.approx(error / frobenius(truth), rel=1e-3, abs=1e-12)
    assert (merged.config.alpha, merged.config.use_rslora) == (merged.config.rank, False)
    assert {shape.rank for shape in merged.shapes.values()} == {plan.rank}
    assert not merged.config.rank_pattern
    assert not merged.config.alpha_pattern
    assert merged.dtype == torch.float32

    order = list(range(len(paths)))
    random.shuffle(order)
    turned = merge(
        [paths[index] for index in order], [weights[index] for index in order], folder / "turned.safetensors"
    )
    assert gap(dense(open_adapter(turned)), dense(merged)) <= 1e-6 * terms


@quick
@given(st.lists(adapters(), min_size=3, max_size=3), st.lists(WEIGHT, min_size=4, max_size=4))
def test_merging_in_two_steps_is_merging_at_once(
    tmp_path: Path, parents: list[dict[str, Any]], weights: list[float]
) -> None:
    """v (u a + w b) + x c is one merge of a, b and c with the weights multiplied out."""
    folder = Path(mkdtemp(dir=tmp_path))
    a, b, c = (save_adapter(folder / f"a{index}", **arguments) for index, arguments in enumerate(parents))
    u, w, v, x = weights
    half = merge([a, b], [u, w], folder / "half.safetensors")
    whole = merge([half, c], [v, x], folder / "whole.safetensors")
    at_once = merge([a, b, c], [v * u, v * w, x], folder / "at-once.safetensors")
    terms = sum(abs(weight) * frobenius(dense(open_adapter(path))) for path, weight in ((a, v * u), (b, v * w), (c, x)))
    assert gap(dense(open_adapter(whole)), dense(open_adapter(at_once))) <= 2e-6 * terms


@quick
@given(adapters())
def test_a_merge_of_one_is_itself_and_minus_itself_is_nothing(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """Weight 1 gives the adapter's delta back; [1, -1] gives zero, which the report shows as cancelled."""
    folder = Path(mkdtemp(dir=tmp_path))
    path = save_adapter(folder / "a", **arguments)
    itself = merge([path], [1.0], folder / "itself.safetensors")
    truth = dense(open_adapter(path))
    assert gap(dense(open_adapter(itself)), truth) <= 1e-6 * frobenius(truth)
    report = merge_to_path(make_plan([str(path)] * 2, [1.0, -1.0], Registry()), folder / "none.safetensors")
    assert frobenius(dense(open_adapter(folder / "none.safetensors"))) <= 1e-6 * frobenius(truth)
    assert report.kept < 1e-6
    assert math.isfinite(report.relative_error)


DELTAS = st.builds(
    lambda seed, rank, scaling: Delta(
        torch.randn(rank, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
        torch.randn(5, rank, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64),
        scaling,
    ),
    *(st.integers(0, 2**31), st.integers(1, 9), st.floats(-9, 9).filter(lambda value: abs(value) > 1e-2)),
)


@quick
@given(DELTAS, DELTAS, WEIGHT, st.integers(0, 4))
def test_the_algebra_on_factors_is_that_of_matrices(left: Delta, right: Delta, weight: float, more: int) -> None:
    """Inner product, norm, distance, padding and sum agree with dense matrices, ranks above the sizes included."""
    a, b = left.dense(), right.dense()
    size = float(a.norm() + b.norm())
    assert inner(left, right) == pytest.approx(float((a * b).sum()), abs=1e-12 * size**2)
    assert norm(left) == pytest.approx(float(a.norm()))
    assert distance(left, right) == pytest.approx(float((a - b).norm()), abs=1e-12 * size)
    torch.testing.assert_close(pad_rank(left, left.rank + more).dense(), a)
    summed = weighted_sum([left, right], [weight, 1])
    assert summed.rank == left.rank + right.rank
    torch.testing.assert_close(summed.dense(), weight * a + b, rtol=1e-12, atol=1e-12 * size * 4)


def test_distance_keeps_its_digits_where_deltas_nearly_agree() -> None:
    """A difference of 1e-10 of the size is measured to several digits, where the squares would lose it."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    B = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    near = Delta(A, B * (1 + 1e-10), 2.0)
    assert distance(Delta(A, B, 2.0), near) == pytest.approx(1e-10 * norm(near), rel=1e-4)


def test_the_same_merge_is_the_same_bytes(tmp_path: Path) -> None:
    """A merge repeated gives the same file, the same folder and the same content digest."""
    a, b = save_adapter(tmp_path / "a", 1), save_adapter(tmp_path / "b", 2)
    one, two = (merge([a, b], [0.7, 0.3], tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    registry = Registry()
    versions = [
        merge_to_registry(make_plan([str(a), str(b)], [0.7, 0.3], registry), registry, "both")[0] for _ in range(2)
    ]
    assert versions[0].content_digest == versions[1].content_digest
    assert [str(version) for version in versions] == ["both@1", "both@2"]


def test_a_folder_is_written_where_no_file_is_named(tmp_path: Path) -> None:
    """An output without .safetensors is a PEFT folder with both files, and it says the same as the single file."""
    a, b = save_adapter(tmp_path / "a", 1), save_adapter(tmp_path / "b", 2)
    merge([a, b], [1, 2], tmp_path / "folder")
    merge([a, b], [1, 2], tmp_path / "file.safetensors")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [CONFIG, WEIGHTS]
    assert (tmp_path / "folder" / WEIGHTS).read_bytes() == (tmp_path / "file.safetensors").read_bytes()
    assert open_adapter(tmp_path / "folder").config == open_adapter(tmp_path / "file.safetensors").config


def test_a_merged_version_names_its_parents(tmp_path: Path) -> None:
    """Lineage tells parents with digests and weights, the base, and the measured error; files by name only."""
    registry = Registry()
    path = save_adapter(tmp_path / "a", 1, hub_id="org/base")
    first = merge_to_registry(make_plan([str(path)], [1], registry), registry, "first", alias="prod")[0]
    mixed = merge_to_registry(make_plan(["first@prod", str(path)], [0.5, 0.25], registry), registry, "mixed")[0]
    parents = mixed.lineage["parents"]
    assert (parents[0]["reference"], parents[0]["weight"]) == ("first@1", 0.5)
    assert parents[0]["manifest_digest"] == first.manifest_digest
    assert (parents[1]["reference"], parents[1]["weight"]) == ("a.safetensors", 0.25)
    assert mixed.lineage["base"] == {"fingerprint": FIRST, "hub_id": "org/base"}
    assert mixed.lineage["merge"]["relative_error"] < 1e-6
    assert str(tmp_path) not in json.dumps(mixed.lineage)


def test_an_output_tells_no_path_of_this_machine(tmp_path: Path) -> None:
    """A base that is named by a folder of some machine does not get into the merged file or version."""
    path = save_adapter(tmp_path / "a", hub_id="/home/me/secret/model")
    merged = merge([path], [0.5], tmp_path / "b.safetensors")
    assert "secret" not in str(read_header(merged).metadata)
    registry = Registry()
    version = merge_to_registry(make_plan([str(path)], [1], registry), registry, "a")[0]
    assert "secret" not in json.dumps(version.lineage)


def test_a_weight_of_zero_leaves_its_adapter_out(tmp_path: Path) -> None:
    """An adapter of weight 0 takes no rank, and modules that only it adapts are not in the result."""
    a = save_adapter(tmp_path / "a", 1, ranks={MODULES[0]: 2})
    b = save_adapter(tmp_path / "b", 2, ranks={MODULES[0]: 3, MODULES[1]: 3})
    merged = open_adapter(merge([a, b], [1, 0], tmp_path / "c.safetensors"))
    assert merged.modules == (MODULES[0],)
    assert merged.config.rank == 2


@pytest.mark.parametrize(
    ("weights", "error", "told"),
    [
        ([1.0], InputError, "2 adapters and 1 weights"),
        ([1.0, 2.0, 3.0], InputError, "2 adapters and 3 weights"),
        ([], InputError, "2 adapters and 0 weights"),
        ([1.0, math.nan], BadReference, "finite"),
        ([math.inf, 1.0], BadReference, "finite"),
        ([0.0, -0.0], InputError, "all weights are zero"),
    ],
)
def test_weights_that_make_no_sum_are_refused(tmp_path: Path, weights: list[float], error: type, told: str) -> None:
    """Too few, too many, not finite or all zero: refused before a file is opened."""
    with pytest.raises(error, match=told):
        make_plan([str(tmp_path / "none"), str(tmp_path / "neither")], weights, Registry())


@pytest.mark.parametrize("weight", [1e300, -1e80, 1.7e308])
def test_a_sum_too_large_to_store_is_refused(tmp_path: Path, weight: float) -> None:
    """A weight whose product overflows float32 is an InputError, and nothing is written or registered."""
    path = save_adapter(tmp_path / "a")
    before = set(tmp_path.rglob("*"))
    registry = Registry()
    plan = make_plan([str(path)], [weight], registry)
    with pytest.raises(InputError, match="too large"):
        merge_to_path(plan, tmp_path / "b.safetensors")
    assert is_nothing_written(tmp_path, before)
    with pytest.raises(InputError, match="too large"):
        merge_to_registry(plan, registry, "b")
    assert registry.versions() == []


def test_adapters_of_different_bases_are_refused_unless_forced(tmp_path: Path) -> None:
    """Fingerprints decide, in any order and with files of unknown base between; force is recorded."""
    a = save_adapter(tmp_path / "a", fingerprint=FIRST)
    b = save_adapter(tmp_path / "b", fingerprint=SECOND)
    unknown = save_adapter(tmp_path / "c", fingerprint=None)
    for order in ([a, b], [b, a], [a, unknown, b], [unknown, b, unknown, a]):
        with pytest.raises(Incompatible, match="different bases") as caught:
            make_plan([str(path) for path in order], [1.0] * len(order), Registry())
        assert a.name in str(caught.value)
        assert b.name in str(caught.value)
    registry = Registry()
    version = merge_to_registry(make_plan([str(a), str(b)], [1, 1], registry, force=True), registry, "x")[0]
    assert version.lineage["merge"]["forced"] is True
    assert make_plan([str(unknown), str(a)], [1, 1], registry).base["fingerprint"] == FIRST


def test_hub_ids_decide_where_a_fingerprint_is_missing(tmp_path: Path) -> None:
    """Files that name different models are refused whatever stands between them; equal fingerprints outweigh names."""
    a = save_adapter(tmp_path / "a", fingerprint=None, hub_id="org/one")
    b = save_adapter(tmp_path / "b", fingerprint=FIRST, hub_id=None)
    c = save_adapter(tmp_path / "c", fingerprint=None, hub_id="org/two")
    d = save_adapter(tmp_path / "d", fingerprint=FIRST, hub_id="org/mirror-of-one")
    e = save_adapter(tmp_path / "e", fingerprint=FIRST, hub_id="org/one")
    for order in ([a, b, c], [a, c, b], [b, a, c], [a, d]):
        with pytest.raises(Incompatible):
            make_plan([str(path) for path in order], [1.0] * len(order), Registry())
    assert make_plan([str(d), str(e)], [1, 1], Registry()).base["fingerprint"] == FIRST
    assert make_plan([str(b), str(a)], [1, 1], Registry()).base["fingerprint"] == FIRST


def test_shapes_of_different_models_are_refused_with_both_names(tmp_path: Path) -> None:
    """A module of another size names the module, both sizes and both files."""
    a = save_adapter(tmp_path / "a")
    b = save_adapter(tmp_path / "b", sizes={**SIZES, MODULES[1]: (8, 16)})
    with pytest.raises(Incompatible) as caught:
        make_plan([str(a), str(b)], [1, 1], Registry())
    for part in (MODULES[1], "12 x 8", "16 x 8", "a.safetensors", "b.safetensors"):
        assert part in str(caught.value)


def test_files_that_cannot_be_merged_leave_nothing(tmp_path: Path) -> None:
    """A truncated file, a NaN, a missing file and a missing reference are refused; the folder stays as it was."""
    a = save_adapter(tmp_path / "a")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(a.read_bytes()[:-1])
    nan = tmp_path / "nan.safetensors"
    nan.write_bytes(a.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    before = set(tmp_path.rglob("*"))
    for label, error in ((cut, BadFile), (nan, BadFile), (tmp_path / "no.safetensors", NotFound), ("no@1", NotFound)):
        with pytest.raises(error):
            merge([a, label], [1, 1], tmp_path / "out.safetensors")
    with pytest.raises(BadReference):
        merge([a, "No Such"], [1, 1], tmp_path / "out.safetensors")
    assert is_nothing_written(tmp_path, before)


@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_an_existing_output_is_not_touched(tmp_path: Path, name: str) -> None:
    """A file or folder at the output, even an empty one, is InUse."""
    a = save_adapter(tmp_path / "a")
    target = tmp_path / name
    target.mkdir() if name == "out" else target.write_bytes(b"mine")
    with pytest.raises(InUse):
        merge([a], [1], target)
    assert target.is_dir() or target.read_bytes() == b"mine"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_peft_on_the_base_computes_what_the_deltas_say(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """Plain PEFT loads the merged folder; its logits are those of the base with the summed deltas beside its layers."""
    from peft import PeftModel

    from adapterhub_local.base.load import load_base

    base = load_base(tiny_base, dtype=torch.float32, device="cpu")
    layers = {name: module for name, module in base.model.named_modules() if name.endswith(("q_proj", "down_proj"))}
    sizes = {name: (module.in_features, module.out_features) for name, module in layers.items()}
    some = {name: 3 for name in sizes if "layers.1" in name}
    paths = [
        save_adapter(tmp_path / "a", 1, sizes=sizes, rslora=True, fingerprint=tiny_base.fingerprint),
        save_adapter(tmp_path / "b", 2, sizes=sizes, ranks=some, fingerprint=tiny_base.fingerprint),
    ]
    weights = [0.07, -0.03]
    merged = merge(paths, weights, tmp_path / "merged")
    deltas = dense_sum(paths, weights)
    ids = torch.arange(40).reshape(2, 20) * 7 % 300

    def beside(name: str) -> Any:
        delta = deltas[name].float()
        return lambda module, inputs, output: output + inputs[0] @ delta.T

    with torch.inference_mode():
        plain = base.model(ids).logits
        hooks = [module.register_forward_hook(beside(name)) for name, module in layers.items()]
        wanted = base.model(ids).logits
        for hook in hooks:
            hook.remove()
        model = PeftModel.from_pretrained(base.model, str(merged)).eval()
        found = model(ids).logits
    assert float((wanted - plain).abs().max()) > 0.1
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_the_library_is_documented_and_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that `adapterhub_local.merge` lists has a docstring, and the example on its page runs."""
    assert set(library.__all__) == set(library._HOMES)
    for name in library.__all__:
        assert name == "METHODS" or (getattr(library, name).__doc__ or "").strip(), name
    readme = (Path(library.__file__).parent / "README.md").read_text(encoding="utf-8")
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "make_plan" in code)
    save_adapter(tmp_path / "a", 1)
    save_adapter(tmp_path / "b", 2)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert open_adapter(tmp_path / "both.safetensors").config.rank == 3
