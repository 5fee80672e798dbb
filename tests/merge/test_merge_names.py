"""Parents whose tensors carry the words of a wrapper are parents of the same modules, and what is odd is reported."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from adapterhub_local.cli.merge import command
from adapterhub_local.errors import BadFile
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.lora.scale import AlphaKnown
from adapterhub_local.merge.merge import merge_to_path
from adapterhub_local.merge.plan import make_plan
from adapterhub_local.registry import Registry
from tests.adapter_files import Q, factors, save_peft

START = "base_model.model."
WRAPPED = {
    "compiled": lambda name: name.replace(START, f"{START}_orig_mod."),
    "compiled outside": lambda name: f"_orig_mod.{name}",
    "checkpointed": lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "sharded": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "doubled": lambda name: START + name,
    "tripled": lambda name: START * 2 + name,
    "DDP": lambda name: f"module.{name}",
    "DDP inside": lambda name: name.replace(START, f"{START}module."),
    "multimodal": lambda name: name.replace(START, f"{START}language_model."),
    "multimodal, new": lambda name: name.replace(f"{START}model.", f"{START}model.language_model."),
    "named": lambda name: name.replace(".weight", ".mine.weight"),
    "bare": lambda name: name.removeprefix(START),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_parent_counts_in_full(kind: str, swapped: bool, registry: Registry, tmp_path: Path) -> None:
    """In either order the sum has both parents in each module, under the name without the wrapper."""
    tensors = factors({Q: (8, 6, 2)})
    plain = save_peft(tmp_path / "plain", tensors)
    other = save_peft(tmp_path / "other", {WRAPPED[kind](name): 2 * value for name, value in tensors.items()})
    labels = [str(other), str(plain)] if swapped else [str(plain), str(other)]

    report = merge_to_path(make_plan(labels, [1.0, 1.0], registry), tmp_path / "sum")

    assert report.notes == []
    merged = open_adapter(tmp_path / "sum")
    assert merged.modules == (Q,)
    torch.testing.assert_close(merged.delta(Q).dense(), 5 * open_adapter(plain).delta(Q).dense())


def test_nothing_in_common_is_reported(registry: Registry, tmp_path: Path) -> None:
    """Parents of different modules are merged, and how many they share is a note of the report."""
    one = save_peft(tmp_path / "one", factors({Q: (8, 6, 2)}))
    up = "model.layers.0.mlp.up_proj"
    two = save_peft(tmp_path / "two", factors({up: (8, 6, 2)}), target_modules=["up_proj"])
    both = save_peft(tmp_path / "both", factors({Q: (8, 6, 2), up: (8, 6, 2)}), target_modules=["q_proj", "up_proj"])

    assert make_plan([str(one), str(two)], [1.0, 1.0], registry).notes == (
        "the adapters have no module in common: each is only scaled by its weight",
    )
    assert make_plan([str(one), str(both)], [1.0, 1.0], registry).notes[0].startswith("1 of 2 modules are in more")


def test_parents_of_unknown_bases_are_reported(registry: Registry, tmp_path: Path) -> None:
    """Whoever names no base, or a folder of some machine, is a note of the merge, be it one parent or all of them."""
    tensors = factors({Q: (8, 6, 2)})
    named = {"hub": "someone/tiny", "folder": "/home/me/llama", "other": "./qwen", "silent": None}
    paths = {
        name: str(save_peft(tmp_path / name, tensors, base_model_name_or_path=base)) for name, base in named.items()
    }
    folder, other = "folder (made on '/home/me/llama')", "other (made on './qwen')"
    for parents, said in {
        ("hub", "hub"): None,
        ("hub",): None,
        ("folder",): None,  # is merged with nothing that it might not fit
        ("folder", "folder"): None,
        ("silent", "silent"): None,
        ("hub", "folder"): f"{folder} does not say for which base: taken to be for the base of the others",
        (
            "silent",
            "hub",
            "other",
        ): f"silent, {other} do not say for which base: taken to be for the base of the others",
        ("folder", "other"): f"{folder}, {other} do not say for which base: taken to be for one base",
    }.items():
        plan = make_plan([paths[name] for name in parents], [1.0] * len(parents), registry)
        assert plan.notes == ((said,) if said else ()), parents


def test_untrained_parent_is_reported(registry: Registry, tmp_path: Path) -> None:
    """An adapter whose B is zero is named, and nobody says that it cancels the other."""
    tensors = factors({Q: (8, 6, 2)})
    good = save_peft(tmp_path / "good", tensors)
    zero = save_peft(tmp_path / "zero", {name: value * ("lora_A" in name) for name, value in tensors.items()})
    report = merge_to_path(make_plan([str(good), str(zero)], [1.0, 1.0], registry), tmp_path / "sum")
    assert report.notes == ["zero changes nothing: its scale or a factor of each module is zero. Was it trained?"]
    done = CliRunner().invoke(command, [str(zero), str(zero), "--weights", "1,1", "-o", str(tmp_path / "none")])
    assert done.exit_code == 0
    assert "no adapter changes anything" in done.output
    assert "cancel" not in done.output
    assert done.output.count("Was it trained?") == 1


def test_weight_of_a_base_that_is_not_here_is_refused(registry: Registry, tmp_path: Path) -> None:
    """What might be the base's own weight cannot be compared without the base: refused with the way out."""
    tensors = {**factors({Q: (8, 6, 2)}), f"{START}lm_head.weight": torch.zeros(2, 2)}
    folder = save_peft(tmp_path / "a", tensors)
    with pytest.raises(BadFile, match=r"lm_head.weight' is not a LoRA factor.*`qhub add`"):
        make_plan([str(folder)], [1.0], registry)


def test_alpha_is_for_those_that_say_none(registry: Registry, tmp_path: Path) -> None:
    """One alpha for all is taken where it is asked for, and refused where every parent says its own."""
    tensors = factors({Q: (8, 6, 2)})
    said = save_peft(tmp_path / "said", tensors)
    silent = save_peft(tmp_path / "silent", tensors)
    (silent / "adapter_config.json").unlink()
    plan = make_plan([str(said), str(silent)], [1.0, 1.0], registry, alpha=8.0)
    assert [parent.adapter.config.alpha for parent in plan.parents] == [4, 8.0]
    with pytest.raises(AlphaKnown, match="says alpha 4, and --alpha 8 was given"):
        make_plan([str(said), str(said)], [1.0, 1.0], registry, alpha=8.0)
