"""Hostile adapters, whole files and folders: each is refused at once, by a sentence that a terminal may print."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapterhub_local.errors import InputError
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.lora.config import CONFIG, CONFIG_KEY, WEIGHTS
from tests.adapter_files import PLAIN, Q, factors, save_peft
from tests.lora.test_lora_header import entry, raw_file
from tests.patience import ends

SOUND = factors({Q: (8, 6, 2)})
BARE = {name.removeprefix("base_model.model."): tensor for name, tensor in SOUND.items()}
A = f"base_model.model.{Q}.lora_A.weight"
Attack = Callable[[Path], Path]


def config(**fields: Any) -> Attack:
    """A folder with these settings."""
    return lambda place: save_peft(place / "a", SOUND, **fields)


def text(content: bytes) -> Attack:
    """A folder whose config is these bytes."""

    def make(place: Path) -> Path:
        folder = save_peft(place / "a", SOUND)
        (folder / CONFIG).write_bytes(content)
        return folder

    return make


def tensors(changes: dict[str, torch.Tensor | None]) -> Attack:
    """A folder with other tensors."""
    changed = {name: tensor.clone() for name, tensor in {**SOUND, **changes}.items() if tensor is not None}
    return lambda place: save_peft(place / "a", changed)


def metadata(values: dict[str, str]) -> Attack:
    """A single file that says this in its header."""

    def make(place: Path) -> Path:
        save_file(SOUND, place / "f.safetensors", metadata=values)
        return place / "f.safetensors"

    return make


def header(value: Any, size: int = 4) -> Attack:
    """A single file with this header."""
    return lambda place: raw_file(place / "f.safetensors", value, bytes(size))


def special(make: Callable[[Path], None], inside: str | None = None) -> Attack:
    """A path that is not an ordinary file, named itself or in an adapter's folder."""

    def made(place: Path) -> Path:
        if inside is None:
            make(place / "f.safetensors")
            return place / "f.safetensors"
        folder = save_peft(place / "a", SOUND)
        (folder / inside).unlink()
        make(folder / inside)
        return folder

    return made


def loop(path: Path) -> None:
    path.symlink_to(path)


ATTACKS: dict[str, tuple[Attack, str]] = {
    "config of 20 MB": (text(b" " * (20 << 20)), "it has more than"),
    "config nested 100,000 deep": (text(b'{"a":' * 100_000), "is not JSON"),
    "config nested in a setting": (text(b'{"peft_type":"LORA","x":' + b"[" * 90_000), "is not JSON"),
    "config of an unended text": (text(b'{"peft_type": "LORA'), "is not JSON"),
    "config that says alpha twice": (
        text(json.dumps(PLAIN)[:-1].encode() + b', "lora_alpha": 400}'),
        "'lora_alpha' occurs twice",
    ),
    "config that says the rank of a module twice": (
        text(json.dumps(PLAIN)[:-1].encode() + b', "rank_pattern": {"q_proj": 2, "q_proj": 4}}'),
        "'q_proj' occurs twice",
    ),
    "config that is UTF-16": (text(json.dumps(PLAIN).encode("utf-16-le")[:-1]), "is not"),
    "config with a number of 5,000 digits": (text(b'{"peft_type":"LORA","r":' + b"9" * 5_000 + b"}"), "is not"),
    "config with a NaN": (config(lora_alpha=float("nan")), "finite alpha"),
    "config that is a pipe": (special(os.mkfifo, CONFIG), "is not a file"),
    "config that is a device": (special(lambda path: path.symlink_to("/dev/zero"), CONFIG), "is not a file"),
    "weights that are a pipe": (special(os.mkfifo, WEIGHTS), "has no adapter_model"),
    "weights that are a device": (special(lambda path: path.symlink_to("/dev/zero"), WEIGHTS), "has no adapter_model"),
    "file that is a pipe": (special(os.mkfifo), "is not a file"),
    "file that is a device": (special(lambda path: path.symlink_to("/dev/zero")), "is not a file"),
    "file that is a loop of links": (special(loop), "cannot be read|there is no file"),
    "rank 10^30": (config(r=10**30), "says 10000"),
    "rank below zero": (config(r=-1), "is not a rank"),
    "alpha 10^400": (config(lora_alpha=10**400), "finite alpha"),
    "alpha 10^300": (config(lora_alpha=1e300), "finite alpha in float32"),
    "alpha of a module 10^39": (config(alpha_pattern={"q_proj": -1e39}), "finite alpha in float32"),
    "alpha as a text": (config(lora_alpha="1e3"), "finite alpha"),
    "a list of lists": (config(target_modules=[["q_proj"]]), "target_modules"),
    "exclude_modules of numbers": (config(exclude_modules=[1, 2]), "exclude_modules"),
    "exclude_modules as a table": (config(exclude_modules={"q_proj": [1]}), "does not name"),
    "layers that are texts": (config(layers_to_transform=["0"]), "layers_to_transform"),
    "layers_pattern that backtracks": (config(layers_to_transform=[0], layers_pattern=["(a+)+(?=x)"]), "linear time"),
    "100 layers_patterns": (config(layers_to_transform=[0], layers_pattern=["a"] * 100), "100 patterns"),
    "200,000 patterns": (config(rank_pattern={f"x{i}": 2 for i in range(200_000)}), "more than any adapter needs"),
    "20,000 slow patterns": (config(alpha_pattern={f"(x+)+{i}": 2 for i in range(20_000)}), "more than any adapter"),
    "pattern to None": (config(rank_pattern={"q_proj": None}), "is not a rank"),
    "pattern with an escape sequence": (config(target_modules="\x1b(?=x)"), "linear time"),
    "setting with an escape sequence": (config(**{"\x1b[31m": 1}), "not supported"),
    "unknown setting of a megabyte": (config(use_x="y" * 1_000_000), "not supported"),
    "all it names is excluded": (config(exclude_modules=["q_proj"]), "does not name"),
    "not the layers it names": (config(layers_to_transform=[5]), "does not name"),
    "the same factor wrapped": (tensors({A.replace(".layers", "._orig_mod.layers"): SOUND[A]}), "there twice"),
    "the same factor, prefix doubled": (tensors({f"base_model.model.{A}": SOUND[A]}), "there twice"),
    "the same factor, without prefix": (tensors({A.removeprefix("base_model.model."): SOUND[A]}), "there twice"),
    "two adapters": (
        tensors({name.replace(".weight", ".other.weight"): value for name, value in SOUND.items()}), "twice|several"
    ),
    "a name of only wrappers": (tensors({"base_model.model.module.lora_A.weight": SOUND[A]}), "is not a LoRA factor"),
    "a name with an escape sequence": (tensors({f"\x1b]0;x\x07{A}": SOUND[A]}), "is not a LoRA factor"),
    "a name of dots": (tensors({"....lora_A.weight": SOUND[A]}), "is not a LoRA factor|has no"),
    "factors of three dimensions": (tensors({A: SOUND[A][None]}), "is not a LoRA factor"),
    "factors of no numbers": (tensors({A: torch.zeros(2, 0)}), "cannot be multiplied"),
    "whole numbers": (tensors({A: SOUND[A].to(torch.int64)}), "save it as F32"),
    "8 bits": (tensors({A: SOUND[A].to(torch.float8_e4m3fn)}), "save it as F32"),
    "header config of a list": (metadata({CONFIG_KEY: "[]"}), "peft_type must be LORA"),
    "diffusers' metadata of a list": (metadata({"lora_adapter_metadata": "[]"}), "not a table"),
    "diffusers' metadata, nested": (metadata({"lora_adapter_metadata": "[" * 100_000}), "not JSON"),
    "diffusers' metadata of two": (metadata({"lora_adapter_metadata": '{"a.r": 1, "b.r": 1}'}), "several models"),
    "diffusers' metadata that hides DoRA": (
        metadata({"lora_adapter_metadata": '{"lora_alpha": 4, "use_dora": true}'}), "use_dora"
    ),
    "diffusers' metadata of another kind": (
        metadata({"lora_adapter_metadata": '{"lora_alpha": 4, "peft_type": "LOHA"}'}), "peft_type must be LORA"
    ),
    "kohya's alpha that is a word": (metadata({"ss_network_alpha": "many"}), "not a number"),
    "kohya's alpha that is NaN": (metadata({"ss_network_alpha": "nan"}), "not a finite number"),
    "kohya's alpha of a megabyte": (metadata({"ss_network_alpha": "9" * 1_000_000}), "not a finite number"),
    "kohya's rank with a fraction": (metadata({"ss_network_alpha": "4", "ss_network_dim": "2.5"}), "is not a rank"),
    "two alphas that differ": (metadata({"ss_network_alpha": "4", "alpha": "8"}), "which is it"),
    "nothing of a scale": (metadata({"format": "pt"}), "give --alpha"),
    "100,000 dimensions": (header({"a": entry(0, 4, (1,) * 100_000)}), "is not valid"),
    "dimensions of 4,000 digits": (header(b'{"a":{"shape":[' + b",".join([b"9" * 4_000] * 900) + b"]}}"), "digits"),
    "names of a megabyte": (header({"x" * 1_000_000: entry(0, 4)}), "is not valid"),
    "30,000 tensors over each other": (header({f"t{i}": entry(0, 4) for i in range(30_000)}), "overlaps"),
}  # fmt: skip


@pytest.mark.parametrize("case", ATTACKS)
def test_hostile_adapter_is_refused_at_once(case: str, tmp_path: Path) -> None:
    """No hang, no crash, no echo of what a terminal would obey, no page of text."""
    make, reason = ATTACKS[case]
    path = make(tmp_path)
    with ends(), pytest.raises(InputError, match=reason) as caught:
        open_adapter(path, dora=True, copies=True)
    assert caught.value.exit_code == 2
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1_200


def test_the_corpus_is_long_enough() -> None:
    """Forty members and more."""
    assert len(ATTACKS) >= 40
