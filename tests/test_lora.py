"""Adapters in and out: hostile files are refused, PEFT's mean what they mean to PEFT, equal factors equal bytes."""

import contextlib
import gc
import itertools
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapterhub_local.errors import BadFile, Incompatible, InputError, NotFound, QhubError
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.lora.adopt import adopt
from adapterhub_local.lora.config import CONFIG, CONFIG_KEY, WEIGHTS, AdapterConfig
from adapterhub_local.lora.finite import check_finite
from adapterhub_local.lora.header import MAX_HEADER_BYTES, read_header
from adapterhub_local.lora.write import DTYPE_NAMES, tensor_name, write_adapter, write_safetensors
from adapterhub_local.registry import Registry

PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
Q = "model.layers.0.self_attn.q_proj"


def factors(modules: Mapping[str, tuple[int, int, int]], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random factors under PEFT's names: module -> (in, out, rank)."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, (size_in, size_out, rank) in modules.items():
        tensors[tensor_name(module, "A")] = torch.randn(rank, size_in, generator=generator).to(dtype)
        tensors[tensor_name(module, "B")] = torch.randn(size_out, rank, generator=generator).to(dtype)
    return tensors


def save_peft(folder: Path, tensors: Mapping[str, torch.Tensor], **fields: Any) -> Path:
    """A folder as PEFT writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps({**PLAIN, **fields}))
    return folder


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header, as a value or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: Any, end: Any, shape: Any = (1,), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    """The header's entry of one tensor."""
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": [start, end],
        **more,
    }


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    """Metadata and entries are read in the order of their bytes; empty tensors and padding are allowed."""
    header = {"b": entry(4, 8), "a": entry(0, 4), "e": entry(4, 4, (0, 3)), "__metadata__": {"k": "v"}}
    read = read_header(raw_file(tmp_path / "f", json.dumps(header).encode() + b"   ", bytes(8)))
    assert list(read.tensors) == ["a", "e", "b"]
    assert read.metadata == {"k": "v"}
    assert read_header(raw_file(tmp_path / "empty", {})).tensors == {}


HOSTILE: dict[str, tuple[Any, int]] = {  # name -> header, bytes of data
    "hole at the start": ({"a": entry(4, 8)}, 8),
    "hole in the middle": ({"a": entry(0, 4), "b": entry(8, 12)}, 12),
    "overlap": ({"a": entry(0, 8, (2,)), "b": entry(4, 8)}, 8),
    "the same bytes twice": ({"a": entry(0, 4), "b": entry(0, 4)}, 4),
    "trailing bytes": ({"a": entry(0, 4)}, 5),
    "missing bytes": ({"a": entry(0, 4)}, 3),
    "no tensors but bytes": ({}, 1),
    "size that does not fit": ({"a": entry(0, 4, (2,))}, 4),
    "negative offset": ({"a": entry(-4, 0)}, 0),
    "backwards": ({"a": entry(4, 0)}, 4),
    "negative shape": ({"a": entry(0, 4, (-1, -1))}, 4),
    "bool as a number": ({"a": entry(False, 4)}, 4),
    "bool in the shape": ({"a": entry(0, 4, (True,))}, 4),
    "float offset": ({"a": entry(0.0, 4.0)}, 4),
    "text offset": ({"a": entry("0", "4")}, 4),
    "shape as text": ({"a": entry(0, 4, "1")}, 4),
    "shape as a table": ({"a": entry(0, 4, {"1": 1})}, 4),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4),
    "extra field": ({"a": entry(0, 4, more=1)}, 4),
    "unknown dtype": ({"a": entry(0, 4, dtype="F31")}, 4),
    "dtype as a list": ({"a": entry(0, 4, dtype=["F32"])}, 4),
    "entry as a list": ({"a": [1, 2]}, 4),
    "entry as null": ({"a": None}, 0),
    "metadata as a list": ({"__metadata__": []}, 0),
    "metadata as null": ({"__metadata__": None}, 0),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0),
    "duplicate tensors": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', 0),
    "duplicate fields": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0),
    "duplicate metadata": (b'{"__metadata__":{"a":"1","a":"2"}}', 0),
    "not JSON": (b"{not json}", 0),
    "a list": (b"[]", 0),
    "a list in spaces": (b" {}", 0),
    "two documents": (b"{}{}", 0),
    "not UTF-8": (b'{"\xff": 1}', 0),
    "UTF-16": ("{}".encode("utf-16-le"), 0),
    "deep nesting": (b'{"a":' + b"[" * 100_000, 0),
    "huge number": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,0]}}', 0),
    "huge product": ({"a": entry(0, 4, (2**62, 2**62))}, 4),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, case: str) -> None:
    """A header that describes anything but tensors side by side in the whole file is BadFile."""
    header, size = HOSTILE[case]
    with pytest.raises(BadFile) as caught:
        read_header(raw_file(tmp_path / "f", header, bytes(size)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 2**32, 2**63, 2**64 - 1])
def test_impossible_header_lengths_are_refused_at_once(tmp_path: Path, length: int) -> None:
    """A header that claims to be larger than any is refused before a byte of it is read."""
    with pytest.raises(BadFile, match="claims"):
        read_header(raw_file(tmp_path / "f", b"{}", length=length))


def test_what_is_no_file(tmp_path: Path) -> None:
    """A missing file is NotFound, a folder is BadFile."""
    with pytest.raises(NotFound):
        read_header(tmp_path / "none")
    with pytest.raises(BadFile):
        read_header(tmp_path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sound adapter in one file."""
    folder = tmp_path_factory.mktemp("small")
    tensors = factors({"m.q": (3, 2, 2)})
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_adapter(folder, AdapterConfig(2, 4, ("q",)), shapes, tensors.items(), None)
    return folder / WEIGHTS


def test_every_truncation_is_refused(small_file: Path, tmp_path: Path) -> None:
    """A file cut off after any of its bytes is BadFile, and so is one with a byte more."""
    data = small_file.read_bytes()
    for size in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(BadFile):
            open_adapter(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(data + b"\0")
    with pytest.raises(BadFile, match="extra bytes"):
        open_adapter(tmp_path / "cut")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(st.data())
def test_changed_bytes_are_read_or_refused(small_file: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A file with some bytes of its header changed is opened and read whole, or refused; nothing else happens."""
    content = bytearray(small_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "changed").write_bytes(content)
    with contextlib.suppress(QhubError):
        for _, delta in open_adapter(tmp_path / "changed").deltas():
            assert torch.isfinite(delta.A).all()
            assert torch.isfinite(delta.B).all()


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
    """The same factors written by processes with different hash seeds give the same files."""
    code = (
        "import sys, torch; from pathlib import Path; from adapterhub_local.lora.adapter import open_adapter;"
        "from adapterhub_local.lora.adopt import rewrite;"
        "rewrite(open_adapter(Path(sys.argv[1])), Path(sys.argv[2]), None, None)"
    )
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        command = [sys.executable, "-c", code, str(small_file), str(tmp_path / seed)]
        subprocess.run(command, check=True, timeout=120, env={"PYTHONHASHSEED": seed, "PATH": ""})
    for name in (WEIGHTS, CONFIG):
        first, second = ((tmp_path / seed / name).read_bytes() for seed in ("1", "2"))
        assert first == second
    assert (tmp_path / "1" / WEIGHTS).read_bytes() == small_file.read_bytes()


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
    "transposed": {"fan_in_fan_out": True},
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
    assert open_adapter(folder).config == AdapterConfig(2, 4, ("q_proj",))


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"\xff", b"{", b"[" * 100_000, b'{"peft_type": "LORA"}'])
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    """A config file that is no table of LoRA settings is BadFile that names the file."""
    folder = save_peft(tmp_path / "a", factors({Q: (8, 6, 2)}))
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(BadFile, match=CONFIG):
        open_adapter(folder)


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
    """A tensor that is no factor, has no partner, or does not fit its partner or the config is named."""
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


@settings(deadline=None)
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
    assert AdapterConfig.parse(config.to_bytes(), "here") == config
    turned = replace(config, rank_pattern=dict(reversed(config.rank_pattern.items())))
    assert turned.to_bytes() == config.to_bytes()


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
    "prefix is no match": {"rank_pattern": {"proj": 9, "q": 9, "self_attn": 9}, "alpha_pattern": {"down": 99}},
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


BASE = {"name": "tiny", "fingerprint": "sha256:" + "1" * 64, "hub_id": "someone/tiny"}


def test_an_adopted_adapter_keeps_its_factors_and_says_what_it_is(tmp_path: Path) -> None:
    """A PEFT folder becomes a version whose one file carries config and base, with its factors of any dtype."""
    tensors = factors({Q: (8, 6, 2)}, torch.bfloat16) | factors(
        {"model.layers.0.mlp.up_proj": (8, 4, 2)}, torch.float16
    )
    fields = {"base_model_name_or_path": "/home/me/secret/model", "target_modules": ["q_proj", "up_proj"]}
    source = save_peft(tmp_path / "peft", tensors, **fields)
    version = adopt(source, "a", Registry(), BASE, staging_folder=tmp_path)
    weights = version.path / WEIGHTS
    assert {name: tensor.dtype for name, tensor in load_file(weights).items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }
    assert all(torch.equal(load_file(weights)[name], tensor) for name, tensor in tensors.items())
    alone = Path(shutil.copy(weights, tmp_path / "alone.safetensors"))
    assert open_adapter(alone).base_fingerprint == BASE["fingerprint"]
    assert open_adapter(alone).config.base_model == "someone/tiny"
    assert "secret" not in json.dumps(version.lineage) + str(read_header(alone).metadata)


def test_an_adapter_of_another_base_is_adopted_only_by_force(tmp_path: Path) -> None:
    """The fingerprint in a file's header decides; forcing is recorded in the lineage."""
    tensors = factors({Q: (8, 6, 2)})
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    (tmp_path / "other").mkdir()
    write_adapter(tmp_path / "other", AdapterConfig(2, 4, ("q_proj",)), shapes, tensors.items(), "sha256:" + "2" * 64)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    with pytest.raises(Incompatible, match="made for another base"):
        adopt(tmp_path / "other", "a", Registry(), BASE, staging_folder=tmp_path / "one")
    assert Registry().versions() == []
    version = adopt(tmp_path / "other", "a", Registry(), BASE, staging_folder=tmp_path / "two", force=True)
    assert version.lineage["forced"] is True


def test_an_adapter_that_names_another_base_is_adopted_only_by_force(tmp_path: Path) -> None:
    """Where a file has no fingerprint the Hub id in its config decides; a path of some machine decides nothing."""
    for number, (base_model, fits) in enumerate(
        {"someone/other": False, "someone/tiny": True, "/some/model": True}.items()
    ):
        (staging := tmp_path / str(number)).mkdir()
        source = save_peft(tmp_path / "peft", factors({Q: (8, 6, 2)}), base_model_name_or_path=base_model)
        with contextlib.nullcontext() if fits else pytest.raises(Incompatible, match="was made for someone/other"):
            adopt(source, "a", Registry(), BASE, staging_folder=staging)
    assert len(Registry().versions("a")) == 2


def test_the_metadata_key_of_a_config_is_read_as_strictly(small_file: Path, tmp_path: Path) -> None:
    """A config in a file's header that is refused names the header of that file."""
    tensors = load_file(small_file)
    for bad in ("", "[]", json.dumps({**PLAIN, "use_dora": True})):
        save_file(tensors, tmp_path / "f.safetensors", metadata={CONFIG_KEY: bad})
        with pytest.raises(BadFile, match=r"\(its header\)"):
            open_adapter(tmp_path / "f.safetensors")


def test_shapes_of_the_wrong_order_are_not_silently_transposed(tmp_path: Path) -> None:
    """Factors of all orders of sizes are either multiplied as (out x r)(r x in) or refused."""
    for size_a, size_b in itertools.product([(2, 8), (8, 2)], [(6, 2), (2, 6)]):
        folder = save_peft(tmp_path / "a", {A: torch.ones(size_a), B: torch.ones(size_b)})
        if (size_a, size_b) == ((2, 8), (6, 2)):
            assert open_adapter(folder).delta(Q).dense().shape == (6, 8)
        else:
            with pytest.raises(BadFile):
                open_adapter(folder)


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


@pytest.mark.parametrize(("fingerprint", "level"), [("sha256:" + "1" * 64, "exact"), (None, "shapes")])
def test_how_far_an_adopted_adapter_fits_is_recorded(tmp_path: Path, fingerprint: str | None, level: str) -> None:
    """A file that names this very base is an exact fit; for others only shapes are known."""
    assert BASE["fingerprint"] == "sha256:" + "1" * 64
    tensors = factors({Q: (8, 6, 2)})
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    (tmp_path / "a").mkdir()
    (tmp_path / "staged").mkdir()
    write_adapter(tmp_path / "a", AdapterConfig(2, 4, ("q_proj",)), shapes, tensors.items(), fingerprint)
    version = adopt(tmp_path / "a", "a", Registry(), BASE, staging_folder=tmp_path / "staged")
    assert version.lineage["compatibility"] == {"level": level, "base_fingerprint": fingerprint, "base_model": None}
