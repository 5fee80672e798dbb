"""What is merged means the same to every reader: the scale formulas of PEFT, vLLM and GGUF runtimes."""

from pathlib import Path

import pytest
import torch

from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.merge import merge_to_path
from adapterhub_local.merge.plan import make_plan
from adapterhub_local.merge.rank_rule import RankRule
from adapterhub_local.registry import Registry
from tests.merges import MODULES, SIZES, dense_sum, gap, save_adapter


@pytest.mark.parametrize(
    "formula", [Formula(), Formula(rule=RankRule("lossless")), Formula(rule=RankRule("max_error", 1e-6))]
)
def test_the_scale_is_one_to_every_reader(tmp_path: Path, formula: Formula) -> None:
    """Parents with rsLoRA, patterns and different ranks: vLLM's and llama.cpp's scale give PEFT's delta."""
    paths = [
        save_adapter(
            tmp_path / "a", 1, rslora=True, alphas={MODULES[0]: 9.0}, ranks=dict(zip(MODULES, (1, 4, 2), strict=True))
        ),
        save_adapter(tmp_path / "b", 2, ranks={MODULES[1]: 3}, alpha=-7),
    ]
    weights = [0.7, -1.3]
    plan = make_plan([str(path) for path in paths], weights, Registry(), formula=formula)
    merge_to_path(plan, tmp_path / "merged")
    merged = open_adapter(tmp_path / "merged")
    config = merged.config.to_json()
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    one_scale = config["lora_alpha"] / config["r"]  # vLLM has one scale and knows no patterns
    by_vllm, by_gguf = {}, {}
    for module, delta in merged.deltas():
        product = delta.B.double() @ delta.A.double()
        by_vllm[module] = one_scale * product
        by_gguf[module] = config["lora_alpha"] / delta.B.shape[1] * product  # llama.cpp: alpha / rank of the tensor
    truth = dense_sum(paths, weights)
    size = sum(float(delta.norm()) for delta in truth.values())
    assert gap(by_vllm, truth) < 2e-6 * size
    assert gap(by_gguf, truth) < 2e-6 * size


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_peft_reads_ranks_that_differ_by_module(tmp_path: Path) -> None:
    """A compact merge has patterns; PEFT's own layers, built from its config, hold the very delta."""
    from peft import LoraConfig, get_peft_model

    a = save_adapter(tmp_path / "a", 1, ranks=dict(zip(MODULES, (5, 1, 3), strict=True)))
    b = save_adapter(tmp_path / "b", 2, ranks={MODULES[0]: 2}, alpha=40)
    formula = Formula(rule=RankRule("rank", 2), compact=True)
    merge_to_path(make_plan([str(a), str(b)], [1, 1], Registry(), formula=formula), tmp_path / "merged")
    merged = open_adapter(tmp_path / "merged")
    config = LoraConfig.from_pretrained(str(tmp_path / "merged"))
    assert isinstance(config, LoraConfig)
    assert len(config.rank_pattern) > 0
    tree = torch.nn.Module()
    for name, (size_in, size_out) in SIZES.items():
        at = tree
        *parents, last = name.split(".")
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.add_module(last, torch.nn.Linear(size_in, size_out, bias=False))
    config.task_type = None  # these layers are no language model
    model = get_peft_model(tree, config)  # type: ignore[arg-type]
    for name, delta in merged.deltas():
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = delta.A, delta.B
        assert layer.lora_A["default"].weight.shape == delta.A.shape
        assert layer.r["default"] == delta.rank
        torch.testing.assert_close(layer.get_delta_weight("default"), delta.dense())
