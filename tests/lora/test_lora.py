"""Adapters in and out: hostile files are refused, PEFT's mean what they mean to PEFT, equal factors equal bytes."""

import gc
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapterhub_local.adopt import rewrite
from adapterhub_local.errors import BadFile, InputError, NotFound
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.lora.finite import check_finite
from adapterhub_local.lora.header import read_header
from adapterhub_local.lora.write import DTYPE_NAMES, tensor_name, write_adapter, write_safetensors
from tests.adapter_files import Q, factors, save_peft


def test_written_files_are_what_the_safetensors_package_reads(tmp_path: Path) -> None:
    """Tensors of every dtype, empty and scalar ones, and any metadata come back from the package's own reader."""
    tensors = {str(dtype): (torch.arange(6).reshape(2, 3) % 2).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "turned": torch.arange(6.0).reshape(2, 3).T}
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    metadata = {"format": "pt", "ü": 'ein "Wort"\n'}
    write_safetensors(tmp_path / "f", shapes, tensors.items(), metadata)
    with safe_open(tmp_path / "f", framework="pt") as file:
        assert file.metadata() == metadata
    read = load_file(tmp_path / "f")
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert list(read_header(tmp_path / "f").tensors) == list(tensors)


def test_equal_adapters_are_equal_bytes_in_every_process(small_file: Path, tmp_path: Path) -> None:
    """The same factors written by processes with different hash seeds, this one and another, give the same files."""
    code = (
        "import sys, torch; from pathlib import Path; from adapterhub_local.lora.adapter import open_adapter;"
        "from adapterhub_local.adopt import rewrite;"
        "rewrite(open_adapter(Path(sys.argv[1])), Path(sys.argv[2]), None, None)"
    )
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # by itself Python takes a random one
    command = [sys.executable, "-c", code, str(small_file), str(there)]
    subprocess.run(command, check=True, timeout=120, env={"PYTHONHASHSEED": seed, "PATH": ""})
    rewrite(open_adapter(small_file), here, None, None)
    for name in (WEIGHTS, CONFIG):
        assert (here / name).read_bytes() == (there / name).read_bytes()
    assert (here / WEIGHTS).read_bytes() == small_file.read_bytes()


def test_three_spellings_of_one_adapter(tmp_path: Path) -> None:
    """A PEFT folder, its weights file named directly, and a self-describing file give the same deltas."""
    folder = save_peft(tmp_path / "peft", factors({Q: (8, 6, 2)}))
    opened = open_adapter(folder)
    assert opened.modules == (Q,)
    assert opened.num_parameters == 2 * (8 + 6)
    assert opened.shapes[Q].in_features == 8
    alone = tmp_path / "alone"
    alone.mkdir()
    tensors = load_file(folder / WEIGHTS)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_adapter(alone, opened.config, shapes, tensors.items(), "sha256:1")
    (alone / WEIGHTS).rename(tmp_path / "one.safetensors")
    single = open_adapter(tmp_path / "one.safetensors")
    assert single.config == opened.config
    assert single.base_fingerprint == "sha256:1"
    wanted = 2.0 * tensors[tensor_name(Q, "B")] @ tensors[tensor_name(Q, "A")]
    for adapter in (opened, single, open_adapter(folder / WEIGHTS)):
        torch.testing.assert_close(adapter.delta(Q).dense(), wanted)


def test_a_foreign_file_needs_its_alpha(tmp_path: Path) -> None:
    """A bare file without config is refused until alpha is given; its ranks are read off its shapes."""
    path = tmp_path / "foreign.safetensors"
    save_file(factors({"m.0.q": (4, 4, 2), "m.1.q": (4, 4, 3)}), path)
    with pytest.raises(BadFile, match="--alpha"):
        open_adapter(path)
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="finite"):
            open_adapter(path, alpha=alpha)
    opened = open_adapter(path, alpha=6)
    assert [opened.config.rank_of(module) for module in opened.modules] == [2, 3]
    assert [delta.scaling for _, delta in opened.deltas()] == [3.0, 2.0]


def test_a_pickled_adapter_is_not_read(tmp_path: Path) -> None:
    """A folder with a pickle is refused with what to do; an empty folder and a missing one are NotFound."""
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(BadFile, match="is a pickle"):
        open_adapter(tmp_path / "pickle")
    with pytest.raises(NotFound):
        open_adapter(tmp_path)
    with pytest.raises(NotFound):
        open_adapter(tmp_path / "none")


def changed(change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, torch.Tensor]:
    """Sound factors of one module, changed in place."""
    tensors = factors({Q: (8, 6, 2)})
    change(tensors)
    return tensors


A, B = tensor_name(Q, "A"), tensor_name(Q, "B")
PREFIX = f"base_model.model.{Q}"
UNSOUND: dict[str, dict[str, torch.Tensor]] = {
    f"{Q} has no {B}": changed(lambda tensors: tensors.pop(B)),
    f"{Q} has no {A}": changed(lambda tensors: tensors.pop(A)),
    "rank 2 and 3": changed(lambda tensors: tensors.update({B: torch.zeros(6, 3)})),
    "has rank 3, its config says 2": factors({Q: (8, 6, 3)}),
    "lm_head.weight": changed(lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)})),
    "lora_embedding_A": changed(lambda tensors: tensors.update({f"{PREFIX}.lora_embedding_A": torch.zeros(2, 2)})),
    "magnitude": changed(lambda tensors: tensors.update({f"{PREFIX}.lora_magnitude_vector.weight": torch.zeros(6)})),
    "[2, 8, 1] F32 is not": changed(lambda tensors: tensors.update({A: torch.zeros(2, 8, 1)})),
    "I32 is not a LoRA factor": changed(lambda tensors: tensors.update({A: torch.zeros(2, 8, dtype=torch.int32)})),
    "cannot be multiplied": changed(lambda tensors: tensors.update({A: torch.zeros(0, 8), B: torch.zeros(6, 0)})),
    f"factors for {Q.replace('q_proj', 'xq_proj')}, which target_modules": factors(
        {Q: (8, 6, 2), Q.replace("q_proj", "xq_proj"): (8, 6, 2)}
    ),
    "is there twice": changed(lambda tensors: tensors.update({f"{PREFIX}.lora_A.default.weight": torch.zeros(2, 8)})),
    "\\x1b[31m": changed(lambda tensors: tensors.update({f"{PREFIX}\x1b[31m.lora_A.weight": torch.zeros(2, 8)})),
    "holds no LoRA factors": {},
}


@pytest.mark.parametrize("told", UNSOUND)
def test_unsound_weights_are_refused_by_name(tmp_path: Path, told: str) -> None:
    """A tensor that is not a factor, has no partner, or does not fit its partner or the config is named."""
    folder = save_peft(tmp_path / "a", UNSOUND[told])
    with pytest.raises(BadFile) as caught:
        open_adapter(folder)
    assert told in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_factor_that_is_not_finite_is_refused_when_it_is_read(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    """NaN or infinity in a factor is BadFile with the tensor's name."""
    tensors = factors({Q: (8, 6, 2)}, dtype)
    tensors[B][3, 1] = value
    adapter = open_adapter(save_peft(tmp_path / "a", tensors))
    with pytest.raises(BadFile, match=r"NaN or infinity in .*lora_B"):
        adapter.delta(Q)


def test_a_file_that_is_damaged_after_it_was_opened_is_refused(small_file: Path, tmp_path: Path) -> None:
    """A file that was cut off since its header was checked is BadFile, not an error of another package."""
    path = Path(shutil.copy(small_file, tmp_path / "a.safetensors"))
    adapter = open_adapter(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BadFile):
        adapter.delta("m.q")
    path.unlink()
    with pytest.raises(BadFile):
        adapter.delta("m.q")


def test_reading_an_adapter_again_and_again_leaves_nothing_behind(small_file: Path) -> None:
    """A server reads adapters all day: not one Python object stays of each tensor it read."""
    adapter = open_adapter(small_file)

    def read(times: int) -> int:
        for _ in range(times):
            assert [module for module, _ in adapter.deltas()] == list(adapter.modules)
        gc.collect()
        return sys.getallocatedblocks()

    before = read(20)
    assert read(300) - before < 100


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 5, r"layers\.1\..*o_proj": 2, "model.layers.0.mlp.up_proj": 7},
        "alpha_pattern": {"up_proj": 3, r".*\.0\.self_attn\.q_proj": 11},
    },
    "patterns and rslora": {
        "use_rslora": True,
        "rank_pattern": {"^model.layers.1.mlp.down_proj": 3},
        "alpha_pattern": {"q_proj": 1},
    },
    "prefix is not a match": {"rank_pattern": {"proj": 9, "q": 9, "self_attn": 9}, "alpha_pattern": {"down": 99}},
    "some layers": {"layers_to_transform": [1]},
    "all linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*layers\.0.*(q|v)_proj"},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of torch.jit, and of PEFT about patterns that match nothing
@pytest.mark.parametrize("case", PEFT_CONFIGS)
def test_deltas_are_those_of_peft_itself(tmp_path: Path, case: str) -> None:
    """Ranks and scalings with rsLoRA and patterns give, module by module, the delta weight that PEFT computes."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from tests.tiny import llama_config

    torch.manual_seed(1)
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    fields = {"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False, **PEFT_CONFIGS[case]}
    config = LoraConfig(**fields)
    model = get_peft_model(LlamaForCausalLM(llama_config()), config)
    model.save_pretrained(tmp_path)
    deltas = dict(open_adapter(tmp_path).deltas())
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert set(deltas) == set(layers)
    for name, layer in layers.items():
        torch.testing.assert_close(deltas[name].dense(), layer.get_delta_weight("default"), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_numbers_that_are_not_finite_are_found_by_their_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """The check without torch agrees with torch about every 16-bit pattern, and about the edges of other types."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    if dtype.itemsize == 2:
        values = bits.view(dtype)
    else:
        edges = [
            0.0,
            -0.0,
            1.0,
            float("nan"),
            float("inf"),
            -float("inf"),
            torch.finfo(dtype).max,
            torch.finfo(dtype).tiny,
        ]
        values = torch.tensor(edges, dtype=torch.float64).to(dtype)
    bad = ~torch.isfinite(values.double())
    assert bad.any()
    save_file({"w": values[~bad].clone(), "v": torch.ones(3, dtype=dtype)}, tmp_path / "good")
    check_finite(tmp_path / "good")
    indices = bad.nonzero().flatten().tolist()
    for index in indices[:: max(1, len(indices) // 20)]:
        save_file({"v": torch.ones(3, dtype=dtype), "w": values[index : index + 1].clone()}, tmp_path / "bad")
        with pytest.raises(BadFile, match="NaN or infinity in w"):
            check_finite(tmp_path / "bad")


def test_shapes_of_the_wrong_order_are_not_silently_transposed(tmp_path: Path) -> None:
    """Factors of all orders of sizes are either multiplied as (out x r)(r x in) or refused."""
    for size_a, size_b in itertools.product([(2, 8), (8, 2)], [(6, 2), (2, 6)]):
        folder = save_peft(tmp_path / "a", {A: torch.ones(size_a), B: torch.ones(size_b)})
        if (size_a, size_b) == ((2, 8), (6, 2)):
            assert open_adapter(folder).delta(Q).dense().shape == (6, 8)
        else:
            with pytest.raises(BadFile):
                open_adapter(folder)
