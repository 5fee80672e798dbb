"""What an adapter may not be: refused by hand and when it is asked for, with the key to blame."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.lora.write import write_safetensors
from tests.serve.conftest import Server
from tests.serve.http.test_operate import load


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in tensors if part in name)


def no_effect(tensors: dict[str, torch.Tensor], config: dict) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def leftover(tensors: dict[str, torch.Tensor], config: dict) -> None:
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = tensors[first(tensors, "q_proj.lora_A")]
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight"] = tensors[first(tensors, "q_proj.lora_B")]


def other_names(tensors: dict[str, torch.Tensor], config: dict) -> None:
    for name in list(tensors):
        tensors[name.replace("model.layers", "model.encoder.layers")] = tensors.pop(name)


def other_base(tensors: dict[str, torch.Tensor], config: dict) -> None:
    config["base_model_name_or_path"] = "someone/quite-another"


def bias(tensors: dict[str, torch.Tensor], config: dict) -> None:
    config["bias"] = "lora_only"


def bias_tensor(tensors: dict[str, torch.Tensor], config: dict) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"] = torch.ones(64)


def lora_bias(tensors: dict[str, torch.Tensor], config: dict) -> None:
    config["lora_bias"] = True


def saved_modules(tensors: dict[str, torch.Tensor], config: dict) -> None:
    config["modules_to_save"] = ["lm_head"]


def saved_tensor(tensors: dict[str, torch.Tensor], config: dict) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(300, 64)


def pissa(tensors: dict[str, torch.Tensor], config: dict) -> None:
    config["init_lora_weights"] = "pissa_niter_4"


def rank_zero(tensors: dict[str, torch.Tensor], config: dict) -> None:
    config["r"] = 0


def empty_factor(tensors: dict[str, torch.Tensor], config: dict) -> None:
    tensors[first(tensors, "lora_A")] = torch.ones(0, 64)


def wrong_rank(tensors: dict[str, torch.Tensor], config: dict) -> None:
    config["r"] = 4


def not_a_number(tensors: dict[str, torch.Tensor], config: dict) -> None:
    tensors[first(tensors, "lora_B")][0, 0] = float("nan")


def infinite_alpha(tensors: dict[str, torch.Tensor], config: dict) -> None:
    config["lora_alpha"] = 10**400


def half(tensors: dict[str, torch.Tensor], config: dict) -> None:
    del tensors[first(tensors, "layers.1.self_attn.v_proj.lora_B")]


def no_tensors(tensors: dict[str, torch.Tensor], config: dict) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (no_effect, "changes nothing"),
        (leftover, "model.layers.7.self_attn.q_proj (no such linear layer)"),
        (other_names, "model.encoder.layers.0.mlp.down_proj (no such linear layer)"),
        (other_base, "someone/quite-another"),
        (bias, "bias = 'lora_only'"),
        (bias_tensor, "model.layers.0.self_attn.q_proj.base_layer.bias"),
        (lora_bias, "lora_bias"),
        (saved_modules, "modules_to_save"),
        (saved_tensor, "base_model.model.lm_head.weight"),
        (pissa, "pissa_niter_4"),
        (rank_zero, "0 is not a rank"),
        (empty_factor, "model.layers.0.self_attn.q_proj has factors of rank 0"),
        (wrong_rank, "has rank 8, its config says 4"),
        (not_a_number, "NaN or infinity in base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"),
        (infinite_alpha, "not a finite alpha"),
        (half, "model.layers.1.self_attn.v_proj has no"),
        (no_tensors, "holds no LoRA factors"),
    ],
)
def test_hostile_adapters(living: Server, lora_root: Path, spoil: Callable[[dict, dict], None], named: str) -> None:
    """What an adapter may not be is 400 with the key to blame, loaded by hand or asked for; never the base's answer."""
    folder = lora_root / spoil.__name__
    folder.mkdir()
    config = json.loads((lora_root / "good1" / CONFIG).read_text())
    tensors = load_file(lora_root / "good1" / WEIGHTS)
    spoil(tensors, config)
    (folder / CONFIG).write_text(json.dumps(config))
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(folder / WEIGHTS, shapes, tensors.items(), {"format": "pt"})
    living.registry.publish(spoil.__name__, {name: folder / name for name in (CONFIG, WEIGHTS)}, {})
    for response in (
        load(living, "hostile", spoil.__name__),
        load(living, spoil.__name__),
        living.complete(model=spoil.__name__, prompt="Hello"),
        living.complete(model="tiny", prompt="Hello", adapters=[{"ref": spoil.__name__, "weight": 0.5}, {"ref": "v0"}]),
    ):
        assert response.status_code == 400, response.text
        message = response.json()["error"]["message"]
        assert named in message
        assert str(lora_root) not in message, "where the server has its files is nobody's business"
        assert str(living.registry.home.root) not in message
    assert living.complete(model="hostile", prompt="Hello").status_code == 404
    assert set(living.service.loaded.sources()) == {"v0"}
