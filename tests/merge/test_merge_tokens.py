"""Merged rows of embeddings are base + sum of w_i (row_i - base), exactly; what is no weighted sum is refused."""

from pathlib import Path

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo, remove_base
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.main import run
from adapterhub_local.errors import Incompatible, InputError
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.merge.compare import compare_deltas
from adapterhub_local.merge.dora import through_base
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.merge import dry_run, merge_to_path, merge_to_registry
from adapterhub_local.merge.methods import METHODS
from adapterhub_local.merge.plan import make_plan
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from serve.adapters.mixture import mixture
from serve.engine.build import build_engine
from serve.engine.options import EngineOptions
from serve.lora.rows import rows_of
from tests.serve import adapter_makers
from tests.token_adapters import EMBEDDINGS, base_of_kind, loaded_by_peft, logits_of, publish, register, save_tokens

HEAD = "lm_head"
IDS = (5, 64, 9, 257, 3, 11)


@pytest.fixture(scope="module", params=["tied", "untied"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseInfo, Registry, Path]:
    """A base of each kind, and adapters whose tokens overlap, one of which has none."""
    folder = tmp_path_factory.mktemp(request.param)
    home = Home(folder / "home")
    info, registry = base_of_kind(request.param, home, folder), Registry(home)
    publish(registry, "one", info, folder, [64, 257], 1)
    publish(registry, "two", info, folder, {"embed_tokens": [9, 64]}, 2)
    publish(registry, "head", info, folder, {"embed_tokens": [3], "lm_head": [64, 11]}, 3)
    adapter_makers.publish(registry, "plain", info, seed=4)
    return info, registry, folder


def weight_of(info: BaseInfo, module: str) -> torch.Tensor:
    model = load_base(info, device="cpu").model
    return (model.get_output_embeddings() if module == HEAD else model.get_input_embeddings()).weight.detach().double()


WEIGHTS = [
    {"one": 0.7, "two": 0.3},
    {"one": 1.5, "two": -0.5},
    {"one": 0.4, "plain": 0.6},
    {"one": 0.0, "two": 1.0},
    {"two": 2.0},
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_rows_are_summed_exactly(place: tuple[BaseInfo, Registry, Path], weights: dict[str, float]) -> None:
    """Over the union of the tokens, an adapter without one having the base's row; the report counts them."""
    info, registry, folder = place
    plan = make_plan(list(weights), list(weights.values()), registry)
    target = folder / f"merged-{'-'.join(map(str, weights.values()))}"
    report = merge_to_path(plan, target)
    merged, base = open_adapter(target, tokens=True), weight_of(info, EMBEDDINGS)
    wanted, ids = base.clone(), set()
    for name, weight in weights.items():
        adapter = open_adapter(registry.resolve(name).path, tokens=True)
        if weight and adapter.tokens:
            own = list(adapter.tokens[EMBEDDINGS].ids)
            wanted[own] += weight * (adapter.rows(EMBEDDINGS).double() - base[own])
            ids |= set(own)

    assert merged.token_ids == tuple(sorted(ids))
    assert torch.equal(merged.rows(EMBEDDINGS), wanted[sorted(ids)].float())
    assert list(merged.tokens) == [EMBEDDINGS]
    assert report.num_parameters == merged.num_parameters
    assert f"rows of the embeddings for {len(ids)} tokens" in " ".join(report.notes)
    assert (report.num_tokens, report.server_rank) == (len(ids), None)
    assert dry_run(plan).to_json() == report.to_json()


def test_peft_and_a_live_mix_compute_the_merge(place: tuple[BaseInfo, Registry, Path]) -> None:
    """PEFT's logits of the merge are those of the base with the summed weights, and the server's mix has its rows."""
    info, registry, _ = place
    plan = make_plan(["one", "two", "plain"], [0.6, 0.5, -0.3], registry)
    version, _ = merge_to_registry(plan, registry, "summed")
    merged = open_adapter(version.path, tokens=True)
    model = load_base(info, device="cpu").model
    with torch.no_grad():
        model.get_input_embeddings().weight[list(merged.token_ids)] = merged.rows(EMBEDDINGS)
    for module, delta in merged.deltas():
        change = delta.dense()
        model.get_submodule(module).register_forward_hook(lambda _, x, out, change=change: out + x[0] @ change.T)
    torch.testing.assert_close(
        logits_of(loaded_by_peft(info, version.path), IDS), logits_of(model, IDS), atol=2e-4, rtol=1e-4
    )
    assert version.lineage["adapter"]["tokens"] == 3

    engine = build_engine(load_base(info, device="cpu"), EngineOptions(max_rows=2, max_adapters=2))
    mix = mixture([(registry.resolve(name), weight) for name, weight in (("one", 0.6), ("two", 0.5), ("plain", -0.3))])
    rows = rows_of(engine.pool.get(engine.pool.acquire(mix).digest))
    assert rows is not None
    assert rows.inputs is not None
    assert tuple(rows.inputs.ids.tolist()) == merged.token_ids
    torch.testing.assert_close(rows.inputs.vectors, merged.rows(EMBEDDINGS), atol=1e-6, rtol=1e-6)


def test_rows_of_the_head(place: tuple[BaseInfo, Registry, Path]) -> None:
    """Where the head has its own matrix its rows are merged as those of the embeddings; where it shares one, alone."""
    info, registry, folder = place
    alone = folder / "alone"
    merge_to_path(make_plan(["head"], [1.0], registry), alone)
    ours, theirs = (open_adapter(path, tokens=True) for path in (alone, registry.resolve("head").path))
    assert {module: ours.tokens[module].ids for module in ours.tokens} == {EMBEDDINGS: (3,), HEAD: (11, 64)}
    assert torch.equal(ours.rows(HEAD), theirs.rows(HEAD)[[1, 0]])
    if load_base(info, device="cpu").model.config.tie_word_embeddings:
        with pytest.raises(Incompatible, match="rows of lm_head apart from those of the embeddings, which base 'tiny'"):
            make_plan(["head", "one"], [0.5, 0.5], registry)
        return
    merge_to_path(make_plan(["head", "one"], [0.5, 0.5], registry), folder / "both")
    both, base = open_adapter(folder / "both", tokens=True), weight_of(info, HEAD)
    wanted = (0.5 * base[[11, 64]] + 0.5 * theirs.rows(HEAD)[[1, 0]].double()).float()
    assert {module: both.tokens[module].ids for module in both.tokens} == {EMBEDDINGS: (3, 64, 257), HEAD: (11, 64)}
    assert torch.equal(both.rows(HEAD), wanted)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "weighted_sum"])
def test_other_methods_are_refused(place: tuple[BaseInfo, Registry, Path], method: str) -> None:
    """No rule of signs, of shares or of angles is defined for rows: the message names the method that is."""
    _, registry, _ = place
    with pytest.raises(Incompatible, match=f"for which {method} is not defined: merge with --method weighted_sum"):
        make_plan(["one", "two"], [0.5, 0.5], registry, formula=Formula(method))


def test_weights_by_layer(place: tuple[BaseInfo, Registry, Path]) -> None:
    """Rows are in no layer, and count with the last group, as a head does."""
    info, registry, folder = place
    merge_to_path(make_plan(["one"], [(0.2, 0.9)], registry), folder / "layered")
    merged, base = open_adapter(folder / "layered", tokens=True), weight_of(info, EMBEDDINGS)[[64, 257]]
    own = open_adapter(registry.resolve("one").path, tokens=True).rows(EMBEDDINGS).double()
    torch.testing.assert_close(merged.rows(EMBEDDINGS), (base + 0.9 * (own - base)).float(), atol=1e-6, rtol=1e-6)


def test_dora_keeps_its_rows_on_the_way(place: tuple[BaseInfo, Registry, Path], tmp_path: Path) -> None:
    """An adapter with DoRA and rows becomes a plain one with the same rows through its base."""
    info, registry, _ = place
    folder = save_tokens(info, tmp_path / "dora", [64, 3], 6, use_dora=True)
    version = register(registry, "dora", info, folder)
    plan = make_plan(["dora"], [1.0], registry, opener=through_base(info, None, tmp_path / "made"))
    merge_to_path(plan, tmp_path / "plain")
    merged, own = (open_adapter(path, dora=True, tokens=True) for path in (tmp_path / "plain", version.path))
    assert not merged.magnitudes
    assert torch.equal(merged.rows(EMBEDDINGS), own.rows(EMBEDDINGS)[[1, 0]])


def test_the_base_is_needed_for_a_part_of_its_rows(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that leave none of the base's rows need no base; others do, and say so with exit code 2."""
    info, registry = base_of_kind("untied", home, tmp_path), Registry(home)
    for seed, tokens in enumerate(([64, 9], [9, 64], [3])):
        publish(registry, f"a{seed}", info, tmp_path, tokens, seed)
    remove_base("tiny", home, force=True)
    merge_to_path(make_plan(["a0", "a1"], [0.25, 0.75], registry), tmp_path / "whole")
    assert open_adapter(tmp_path / "whole", tokens=True).token_ids == (9, 64)
    for names, weights in ((["a0", "a1"], "1,1"), (["a0", "a2"], "0.5,0.5")):
        with pytest.raises(SystemExit) as ended:
            run(["merge", *names, "--weights", weights, "--output", str(tmp_path / "not")])
        told = capsys.readouterr().err
        assert ended.value.code == 2
        assert "has rows of the embeddings, and a merge keeps a part of the base's own, which is not here" in told
    assert not (tmp_path / "not").exists()


def test_rows_that_overflow(place: tuple[BaseInfo, Registry, Path], tmp_path: Path) -> None:
    """A weight that no row survives is named before anything is written."""
    _, registry, _ = place
    with pytest.raises(InputError, match="too large for float32"):
        merge_to_path(make_plan(["one"], [1e39], registry), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_rows_are_compared(place: tuple[BaseInfo, Registry, Path]) -> None:
    """A difference has a line for the embeddings: norms and cosine of what the rows change, over all their tokens."""
    info, registry, _ = place
    one, two, plain = (open_adapter(registry.resolve(name).path, tokens=True) for name in ("one", "two", "plain"))
    base = weight_of(info, EMBEDDINGS)
    moved = torch.zeros(2, *base.shape, dtype=torch.float64)
    for side, adapter in zip(moved, (one, two), strict=True):
        ids = list(adapter.tokens[EMBEDDINGS].ids)
        side[ids] = adapter.rows(EMBEDDINGS).double() - base[ids]
    *_, found = compare_deltas(one, two, (info, info))
    *_, other = compare_deltas(plain, one, (None, info))
    assert found.module == other.module == EMBEDDINGS
    assert (found.left, found.right) == pytest.approx(tuple(moved.flatten(1).norm(dim=1).tolist()), rel=1e-5)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(*moved.flatten(1), dim=0)), abs=1e-5)
    assert (other.left, other.right, other.cosine) == (None, pytest.approx(found.left), None)
