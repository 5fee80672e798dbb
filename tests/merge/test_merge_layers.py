"""Weights by groups of layers: each group is the merge with its own weights, in plans, files and lineage alike."""

import json
from pathlib import Path

import pytest

from adapterhub_local.errors import BadReference, InputError
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.layers import groups, layer, num_groups
from adapterhub_local.merge.merge import merge_to_path, merge_to_registry
from adapterhub_local.merge.plan import make_plan
from adapterhub_local.registry import Registry
from tests.cli.test_cli import Qhub, qhub  # noqa: F401
from tests.merges import MODULES, dense, gap, save_adapter

BY_GROUP = [(0.75, 0.25), (0.5, -1.0)]


@pytest.mark.parametrize(("method", "given"), [("weighted_sum", {}), ("ties", {"density": 0.5}), ("slerp", {})])
def test_each_group_is_merged_with_its_own_weights(tmp_path: Path, method: str, given: dict) -> None:
    """The modules of a group are those of the merge with the group's weights everywhere, by every kind of method."""
    paths = [str(save_adapter(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    weights = [(0.75, 0.25), (0.5, 1.0)]
    formula = Formula(method, given)

    def merged(name: str, weights: list) -> dict:
        merge_to_path(make_plan(paths, weights, Registry(), formula=formula), tmp_path / f"{name}.safetensors")
        return dense(open_adapter(tmp_path / f"{name}.safetensors"))

    both, first, second = merged("both", weights), merged("first", [0.75, 0.5]), merged("second", [0.25, 1.0])
    for module in MODULES:
        wanted = first if layer(module) == 0 else second
        assert gap({module: both[module]}, {module: wanted[module]}) < 1e-6


def test_equal_weights_in_all_groups_are_one_weight(tmp_path: Path) -> None:
    """The same numbers; and an adapter may have one number where another has a list."""
    paths = [str(save_adapter(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    for name, weights in (("one", [0.5, 0.25]), ("lists", [(0.5, 0.5), (0.25, 0.25)]), ("mixed", [(0.5, 0.5), 0.25])):
        merge_to_path(make_plan(paths, weights, Registry()), tmp_path / name)
    one, lists, mixed = (dense(open_adapter(tmp_path / name)) for name in ("one", "lists", "mixed"))
    assert gap(one, lists) == gap(one, mixed) == 0


def test_an_adapter_with_weight_zero_in_a_group_takes_no_rank_there(tmp_path: Path) -> None:
    """A group where one adapter has weight 0 has the other's rank; where all have, its modules are not there."""
    paths = [str(save_adapter(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    plan = make_plan(paths, [(1.0, 0.0), (1.0, 1.0)], Registry())
    assert [plan.shapes[module].rank for module in MODULES] == [4, 4, 2]
    merge_to_path(make_plan(paths, [(1.0, 0.0), (1.0, 0.0)], Registry()), tmp_path / "m.safetensors")
    assert set(open_adapter(tmp_path / "m.safetensors").modules) == set(MODULES[:2])


def test_layers_are_divided_evenly_and_in_order() -> None:
    """Consecutive layers, sizes that differ by one at most, and what is in no layer at the end."""
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(7)]
    found = groups([*names, "lm_head"], 3)
    assert [found[name] for name in names] == [0, 0, 0, 1, 1, 2, 2]
    assert found["lm_head"] == 2
    assert [layer(name) for name in ("lm_head", "transformer.h.11.attn.c_attn", "layers.3")] == [None, 11, 3]
    assert groups(["lm_head"], 1) == {"lm_head": 0}


@pytest.mark.parametrize(
    ("weights", "error", "told"),
    [
        ([(1.0, 2.0), (1.0, 2.0, 3.0)], InputError, "lists of 2 and 3 weights"),
        ([(1.0, float("nan")), 1.0], BadReference, "must be finite numbers, not 1/nan, 1"),
        ([(0.0, 0.0), 0.0], InputError, "all weights are zero"),
        ([(1.0, 1.0, 1.0), 1.0], InputError, "weights for 3 groups of layers, but the adapters have 2 layers"),
    ],
)
def test_weights_that_fit_no_layers_are_refused(tmp_path: Path, weights: list, error: type, told: str) -> None:
    """With what is there and what is needed."""
    paths = [str(save_adapter(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    with pytest.raises(error, match=told):
        make_plan(paths, weights, Registry())
    with pytest.raises(InputError, match="sum to 0"):  # each group is checked by the method
        make_plan(paths, [(1.0, 1.0), (1.0, -1.0)], Registry(), formula=Formula("weighted_average"))
    assert num_groups([1.0, (1.0, 2.0)]) == 2


def test_the_weights_of_groups_are_kept_and_shown(qhub: Qhub, tmp_path: Path) -> None:  # noqa: F811
    """In the lineage each parent has its list, and the mean for who reads one number; a plan and options say them."""
    paths = [str(save_adapter(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    registry = Registry()
    version, _ = merge_to_registry(make_plan(paths, BY_GROUP, registry), registry, "both")
    parents = version.lineage["parents"]
    assert [parent["weights"] for parent in parents] == [[0.75, 0.25], [0.5, -1.0]]
    assert [parent["weight"] for parent in parents] == [0.5, -0.25]
    assert "a.safetensors x 0.75/0.25" in qhub("show", "both@1").out

    entries = "".join(
        f'[[adapter]]\nreference = "{name}.safetensors"\nweight = {list(weight)}\n\n'
        for name, weight in zip("ab", BY_GROUP, strict=True)
    )
    (tmp_path / "plan.toml").write_text(entries)
    for place in (("plan.toml",), ("a.safetensors", "b.safetensors", "--weights", "0.75/0.25,0.5/-1")):
        done = qhub("merge", *(tmp_path / one if one.endswith(("toml", "tensors")) else one for one in place),
                    "--name", "both", "--json")  # fmt: skip
        assert done.code == 0, done.err
        assert json.loads(done.out)["content_digest"] == version.content_digest
    (tmp_path / "plan.toml").write_text(entries.replace("[0.5, -1.0]", "[0.5, -1.0, 2]"))
    refused = qhub("merge", tmp_path / "plan.toml")
    assert (refused.code, "plan.toml:3: lists of 2 and 3 weights" in refused.err) == (2, True), refused.err
