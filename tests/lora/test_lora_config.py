"""An adapter's config: what is not supported is refused with its reason, the rest means what it means to PEFT."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapterhub_local.errors import BadFile
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.lora.config import CONFIG, CONFIG_KEY, AdapterConfig, Narrowing
from adapterhub_local.lora.config_reader import parse_config
from tests.adapter_files import PLAIN, Q, factors, save_peft

REFUSED: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "changes biases": {"bias": "lora_only"},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "have a bias": {"lora_bias": True},
    "changed base": {"init_lora_weights": "pissa"},
    "init_lora_weights = 'pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights = 'olora'": {"init_lora_weights": "olora"},
    "embeddings": {"trainable_token_indices": [1, 2]},
    "not linear layers": {"target_parameters": ["experts.w1"]},
    "the layers of the shared base": {"layer_replication": [[0, 2]]},
    "keeps weights transposed": {"fan_in_fan_out": True},
    "aLoRA": {"alora_invocation_tokens": [1]},
    "use_new_thing": {"use_new_thing": {"a": 1}},
    "use_other_thing = 0.5": {"use_other_thing": 0.5},
    "peft_type must be LORA": {"peft_type": "LOHA"},
    "is not a rank": {"r": 0},
    "2.0 is not a rank": {"r": 2.0},
    "True is not a rank": {"r": True},
    "finite alpha": {"lora_alpha": float("nan")},
    "is not a finite alpha": {"lora_alpha": 10**400},
    "not a finite alpha": {"lora_alpha": "16"},
    "neither true nor false": {"use_rslora": "false"},
    "target_modules": {"target_modules": {"a": 1}},
    "wrong or missing": {"rank_pattern": {"(": 2}},
    "missing setting": {"rank_pattern": [1]},
    "'x' is not a rank": {"rank_pattern": {"q": "x"}},
    "None is not a finite alpha": {"alpha_pattern": {"q": None}},
    "not a name": {"base_model_name_or_path": 3},
}


@pytest.mark.parametrize("told", REFUSED)
def test_unsupported_settings_are_refused_with_their_reason(tmp_path: Path, told: str) -> None:
    """A setting that would make the result no plain LoRA delta, or that is not known, is refused and named."""
    folder = save_peft(tmp_path / "a", factors({Q: (8, 6, 2)}), **REFUSED[told])
    with pytest.raises(BadFile) as caught:
        open_adapter(folder)
    assert told in str(caught.value)
    assert str(folder) in str(caught.value)


def test_harmless_and_unset_settings_are_accepted(tmp_path: Path) -> None:
    """What does not change the delta, and settings of newer PEFT that are off, do not stand in the way."""
    harmless = {"lora_dropout": 0.1, "inference_mode": True, "layers_to_transform": [0], "revision": "main"}
    unset = {
        "use_dora": False,
        "modules_to_save": None,
        "use_new_thing": False,
        "arrow_config": None,
        "rank_pattern": {},
    }
    folder = save_peft(tmp_path / "a", factors({Q: (8, 6, 2)}), **harmless, **unset, init_lora_weights="gaussian")
    read = open_adapter(folder).config
    assert read == AdapterConfig(2, 4, ("q_proj",), narrowing=Narrowing(layers=(0,)))
    assert read.for_modules([Q]) == AdapterConfig(2, 4, (Q,))


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"\xff", b"{", b"[" * 100_000, b'{"peft_type": "LORA"}'])
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    """A config file that is not a table of LoRA settings is BadFile that names the file."""
    folder = save_peft(tmp_path / "a", factors({Q: (8, 6, 2)}))
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(BadFile, match=CONFIG):
        open_adapter(folder)


@given(
    rank=st.integers(1, 64),
    alpha=st.floats(1e-3, 1e3),
    rslora=st.booleans(),
    names=st.lists(st.from_regex(r"[a-z]{1,5}(\.[a-z]{1,5})?", fullmatch=True), max_size=3, unique=True),
)
def test_configs_round_trip(rank: int, alpha: float, rslora: bool, names: list[str]) -> None:
    """A config written as PEFT's JSON is read back as itself, and equal configs are equal bytes."""
    config = AdapterConfig(
        rank,
        alpha,
        tuple(sorted(["x", *names])),
        rslora,
        dict.fromkeys(names, 3),
        dict.fromkeys(names, 1.5),
        "org/base",
    )
    assert parse_config(config.to_bytes(), "here") == config
    turned = replace(config, rank_pattern=dict(reversed(config.rank_pattern.items())))
    assert turned.to_bytes() == config.to_bytes()


def test_the_metadata_key_of_a_config_is_read_as_strictly(small_file: Path, tmp_path: Path) -> None:
    """A config in a file's header that is refused names the header of that file."""
    tensors = load_file(small_file)
    for bad in ("", "[]", json.dumps({**PLAIN, "use_dora": True})):
        save_file(tensors, tmp_path / "f.safetensors", metadata={CONFIG_KEY: bad})
        with pytest.raises(BadFile, match=r"\(its header\)"):
            open_adapter(tmp_path / "f.safetensors")


@pytest.mark.parametrize(
    ("target_modules", "module", "fits"),
    [
        (["q_proj"], "model.layers.0.self_attn.q_proj", True),
        (["q_proj"], "q_proj", True),
        (["q_proj"], "model.layers.0.self_attn.xq_proj", False),
        (["self_attn.q_proj"], "model.layers.0.self_attn.q_proj", True),
        (["self_attn.q_proj"], "model.layers.0.cross_attn.q_proj", False),
        (r".*\.(q|v)_proj", "model.layers.0.self_attn.v_proj", True),
        (r".*\.(q|v)_proj", "model.layers.0.self_attn.k_proj", False),
        ("all-linear", "anything", True),
    ],
)
def test_target_modules_are_read_as_peft_reads_them(target_modules: list | str, module: str, fits: bool) -> None:
    """A list names the ends of modules, a text is a pattern for the whole name; PEFT itself says the same."""
    targets = tuple(target_modules) if isinstance(target_modules, list) else target_modules
    assert AdapterConfig(2, 4, targets).targets(module) is fits
    if target_modules != "all-linear":
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        config = LoraConfig(target_modules=target_modules)
        assert bool(check_target_module_exists(config, module)) is fits
