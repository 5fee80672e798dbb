"""A base is read back before it is there: what was written must be the source, and compute what the source does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from adapterhub_local.base import add, read_back
from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import find_base, list_bases
from adapterhub_local.base.read_back import are_close
from adapterhub_local.cli.main import qhub
from adapterhub_local.errors import BadFile
from adapterhub_local.settings import Home
from tests.tiny import save_tiny_model

Tensors = dict[str, torch.Tensor]
GATE, UP = (f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj"))
PARTS = ("", ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")


def swap(tensors: Tensors) -> None:
    for part in PARTS:
        tensors[GATE + part], tensors[UP + part] = tensors[UP + part], tensors[GATE + part]


def shift(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)


def scale(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01


def turn(tensors: Tensors) -> None:
    tensors[GATE] = tensors[GATE].flip(0)


def leave_out(tensors: Tensors) -> None:
    del tensors["model.layers.1.input_layernorm.weight"]


DAMAGE: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "two weights swapped": (swap, "gate_proj.weight is not what the model has"),
    "rows of the embeddings moved": (shift, "embed_tokens.weight is not what the model has"),
    "a norm that is another": (scale, "norm.weight is not what the model has"),
    "codes in another order": (turn, "gate_proj.weight is not what the model has"),
    "a tensor that is missing": (leave_out, "layers.1.input_layernorm.weight was not written"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_written_wrongly_is_not_added(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A tensor that is not the source's, wherever it went wrong, is found before the base is there; nothing is left."""
    damage, message = DAMAGE[kind]
    written = add._Weights.close

    def close(weights: add._Weights) -> None:
        written(weights)
        tensors = load_file(weights.folder / "model.safetensors")
        damage(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights.folder / "model.safetensors")

    monkeypatch.setattr(add._Weights, "close", close)
    with pytest.raises(BadFile, match=message):
        add_base("bad", save_tiny_model(tmp_path / "model"), home)

    assert list_bases(home) == []
    assert not list(home.tmp.iterdir())


def test_what_is_loaded_wrongly_is_not_added(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base whose tensors are right, and that computes something else once it is loaded, is not added."""
    loaded = read_back.load_base

    def load(*args, **named):
        base = loaded(*args, **named)
        layers = base.model.model.layers
        layers[0].mlp.gate_proj, layers[0].mlp.up_proj = layers[0].mlp.up_proj, layers[0].mlp.gate_proj
        return base

    monkeypatch.setattr(read_back, "load_base", load)
    with pytest.raises(BadFile, match="does not compute what the model does, so it is not added"):
        add_base("bad", save_tiny_model(tmp_path / "model"), home)

    assert list_bases(home) == []


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"num_hidden_layers": 1, "attention_bias": True}]
)
def test_right_ones_are_read_back(home: Home, tmp_path: Path, changes: dict[str, object]) -> None:
    """A base that was read back says nothing of it."""
    assert add_base("good", save_tiny_model(tmp_path / "model", **changes), home).not_read_back is None


def test_too_little_memory_is_said(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the base does not fit into memory it is added all the same, and the command and its record say so."""
    monkeypatch.setattr(read_back, "available_memory", lambda: 1000)
    run = CliRunner().invoke(qhub, ["base", "add", "large", str(save_tiny_model(tmp_path / "model"))])

    assert run.exit_code == 0
    assert "not read back and compared with its source: it takes about 0.0 GB of memory, and 0.0 GB is" in run.output
    assert "is free" in (find_base("large", home).not_read_back or "")
    assert "not read back" in CliRunner().invoke(qhub, ["base", "show", "large"]).output


def test_close_is_close() -> None:
    """Noise of the order of sums passes, one token that went another way passes, a part that is another does not."""
    wanted = torch.randn(8, 320, generator=torch.Generator().manual_seed(0))
    other = wanted.roll(1, -1)

    assert are_close(wanted + 1e-4, wanted)
    assert are_close(torch.cat([wanted[:6], other[6:]]), wanted)
    assert not are_close(torch.cat([wanted[:2], other[2:]]), wanted)
    assert not are_close(wanted * 1.05, wanted)
    assert not are_close(wanted.log(), wanted)
