"""The plan of a run: what it counts is what autograd keeps, the device's limits are met exactly, and it says so."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.experts import build_model
from adapterhub_local.base.load import load_base
from adapterhub_local.base.quantise import quantised_modules
from adapterhub_local.cli.plan import command
from adapterhub_local.errors import BadFile, InputError, NotFound
from adapterhub_local.machine import available_memory
from adapterhub_local.plan import activations
from adapterhub_local.plan.activations import Pass, kept
from adapterhub_local.plan.device import Device, find_device, parse_size
from adapterhub_local.plan.memory import STATES, WHOLE_BLOCKS, base_bytes, estimate, num_factors
from adapterhub_local.plan.rows import pack_examples, read_examples
from adapterhub_local.plan.run_plan import largest_tokens, plan
from adapterhub_local.plan.shape import Shape, read_config, read_shape
from adapterhub_local.recipe import load_recipe
from adapterhub_local.rows import bounds
from adapterhub_local.rows.attention import attach
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.packing import forward, pack
from adapterhub_local.settings import Home
from adapterhub_local.train import check
from adapterhub_local.train.adapter import with_adapter
from adapterhub_local.train.checkpointing import enable_checkpointing, split_mlps
from adapterhub_local.train.fused_lora import fuse
from adapterhub_local.train.objectives.sft import Sft
from tests.architectures import SHAPES, in_nf4
from tests.chats import write_recipe
from tests.tiny import VOCABULARY

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
RUN = Pass(2048, 512, False, 2, 4, 16, ("all-linear",))
NAMES = [name for name in SHAPES if name not in ("mistral-window", "qwen3-moe-partly")]


def config_of(name: str, **changes) -> object:
    kind, special = SHAPES[name]
    common = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8}
    if "sliding_window" in special:
        special = {**special, "sliding_window": None if special["sliding_window"] is None else 1024}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 2048}
    return kind(**{**common, **special, **ids, **changes})


def kept_by_autograd(model, examples: list[Example]) -> int:
    """Bytes of all storages that the forward pass of a row saves, parameters and buffers left out."""
    own = {part.untyped_storage().data_ptr() for part in [*model.parameters(), *model.buffers()]}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved.setdefault(storage.data_ptr(), (storage.nbytes(), tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        forward(model, pack(examples))
    return sum(size for size, _ in saved.values())


def examples_of(count: int, length: int) -> list[Example]:
    return [Example(tuple(range(10 + at, 10 + at + length)), ((length - 20, length),)) for at in range(count)]


# -- what is counted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_what_autograd_keeps(name: str) -> None:
    """For every architecture, alone and packed, in 16 and 32 bits: the plan's count is autograd's within 2 %."""
    config = config_of(name)
    shape = read_shape(json.loads(config.to_json_string()))
    for dtype in (torch.float32, torch.bfloat16):
        model = in_nf4(build_model(config, dtype=dtype))
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
        fuse(model)
        assert attach(model) != (config.model_type == "falcon")
        for count in (1, 3):
            tokens = 100 * count
            run = Pass(tokens, 20 * count, count > 1, dtype.itemsize, 4, 8, ("all-linear",), longest=100)
            assert kept(shape, run) == pytest.approx(kept_by_autograd(model, examples_of(count, 100)), rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_mlps_in_parts_keep_their_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of MLPs computed in parts the plan counts one part, and beside it what autograd keeps within 2 %."""
    monkeypatch.setattr(bounds, "MLP_TOKENS", 64)
    config = config_of(name)
    model = in_nf4(build_model(config))
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    fuse(model)
    enable_checkpointing(model, True)
    # to see into the blocks; transformers 5.17 has the older name alone
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    model.disable_input_require_grads()
    split_mlps(model, 64)
    attach(model)
    shape = read_shape(json.loads(config.to_json_string()))
    run = Pass(300, 60, True, 4, 4, 8, ("all-linear",), longest=100)
    one = activations.block(shape, replace(run, is_offloaded=True))
    monkeypatch.setattr(bounds, "MLP_TOKENS", 128)
    inside = (activations.block(shape, replace(run, is_offloaded=True)) - one) / 64

    assert inside > shape.intermediate * 4
    whole = activations.block(shape, run)
    counted = kept(shape, run) - shape.layers * (whole - one + inside * 64)
    assert counted == pytest.approx(kept_by_autograd(model, examples_of(3, 100)), rel=0.02)


@pytest.mark.parametrize(
    "change", ["adapter.dropout=0.1", "adapter.dtype=bfloat16", "adapter.target_modules=attention"]
)
def test_activations_of_other_adapters(tiny_base: BaseInfo, tmp_path: Path, change: str) -> None:
    """Dropout, 16-bit factors and few targets change what is kept as counted, on a real 4-bit base."""
    recipe = load_recipe(write_recipe(tmp_path), [change, "adapter.rank=8"])
    dtype = torch.bfloat16 if "bfloat16" in change else torch.float32
    model = with_adapter(load_base(tiny_base, dtype=dtype), recipe).train()
    shape, targets = read_config(tiny_base.folder), (str(recipe.adapter.target_modules),)
    factor = 2 if "bfloat16" in change else 4
    run = Pass(100, 20, False, dtype.itemsize, factor, 8, targets, "dropout" in change)

    assert kept(shape, run) == pytest.approx(kept_by_autograd(model, examples_of(1, 100)), rel=0.04)


def test_what_moves_to_the_host() -> None:
    """Offloading keeps one block's input instead of all and no embeddings; what is moved is counted for the host."""
    shape = read_shape(LLAMA_8B)
    kept_run = replace(RUN, is_checkpointed=True)
    moved_run = replace(kept_run, is_offloaded=True)
    before, after = (estimate(shape, run, "adamw_8bit", "cuda") for run in (kept_run, moved_run))
    row, table = 2 * 4096 * 2048, 2 * 4096 * 128256

    assert before.activations - after.activations == 31 * row
    assert before.base - after.base == table
    assert (before.host, after.host) == (0, 32 * row + table)
    assert before.total - after.total > 31 * row + table
    tied = estimate(replace(shape, is_tied=True), moved_run, "adamw_8bit", "cuda")
    assert tied.host == 32 * row


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_counted(name: str) -> None:
    """Linear, embedding and adapter parameters are those of the model; norms and biases are within 1 %."""
    config = config_of(name, hidden_size=256)
    shape = read_shape(json.loads(config.to_json_string()))
    with torch.device("meta"):
        model = build_model(config)
    linear = sum(model.get_submodule(module).weight.numel() for module in quantised_modules(model))
    peft = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    factors = sum(part.numel() for part in peft.parameters() if part.requires_grad)

    assert shape.linear_size == linear
    assert num_factors(shape, 3, ("all-linear",)) == factors
    assert shape.num_parameters == pytest.approx(peft.num_parameters() - factors, rel=0.01)


def test_bytes_of_a_known_model() -> None:
    """Llama-3.1-8B: 8.03 billion parameters, 41.9 million factors at rank 16, 5.70 GB in NF4 and 16 bits."""
    shape = read_shape(LLAMA_8B)

    assert shape.num_parameters == pytest.approx(8.03e9, rel=1e-3)
    assert num_factors(shape, 16, ("all-linear",)) == 41_943_040
    assert base_bytes(shape, 2) == pytest.approx(5.70e9, rel=0.01)


@pytest.mark.parametrize("optimizer", STATES)
def test_rows_of_tokens_are_counted(optimizer: str) -> None:
    """A row that is trained takes itself, its gradient and the optimizer's states, in float32 whatever A and B are."""
    shape = read_shape(LLAMA_8B)
    plain, own = (estimate(shape, replace(RUN, trained_tokens=count), optimizer, "cuda") for count in (0, 3))
    numbers = 3 * 4096
    assert (own.adapter - plain.adapter, own.gradients - plain.gradients) == (4 * numbers, 4 * numbers)
    assert own.optimizer - plain.optimizer == STATES[optimizer] * numbers


@given(st.integers(1, 8192), st.integers(1, 4096), st.integers(1, 256), st.sampled_from(sorted(STATES)), st.booleans())
def test_more_takes_more(tokens: int, labels: int, rank: int, optimizer: str, packed: bool) -> None:
    """Tokens, labels, rank and a mask never make a run smaller; checkpointing never larger by more than one block."""
    shape = read_shape({**LLAMA_8B, "num_hidden_layers": 4})
    run = Pass(tokens, labels, packed, 2, 4, rank, ("all-linear",))
    for device in ("cpu", "cuda"):
        total = estimate(shape, run, optimizer, device).total
        for more in (
            replace(run, tokens=tokens + 1),
            replace(run, labels=labels + 1),
            replace(run, rank=rank + 1),
            replace(run, is_packed=True),
        ):
            assert estimate(shape, more, optimizer, device).total >= total
        assert estimate(shape, run, optimizer, device).total == sum(
            value
            for name, value in estimate(shape, run, optimizer, device).to_json().items()
            if name not in ("total", "paged", "host")
        )


def test_a_base_in_parts() -> None:
    """Of a base that processes divide one has its part of the 4-bit codes and blocks that are whole, never more than
    all; the rest of the base, and what a step takes, stays as it is."""
    shape = read_shape({**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80})
    run = Pass(1024, 256, True, 2, 4, 16, ("all-linear",), is_checkpointed=True)
    whole, *parts = (estimate(shape, replace(run, shards=count), "adamw", "cuda") for count in (1, 2, 4, 8))
    codes = shape.linear_size // 2

    for count, part in zip((2, 4, 8), parts, strict=True):
        assert whole.base - part.base == pytest.approx(codes * (1 - 1 / count - WHOLE_BLOCKS / 80), abs=2)
        assert replace(part, base=whole.base) == whole
    few = read_shape({**LLAMA_8B, "num_hidden_layers": 2})
    assert base_bytes(few, 2, shards=2) == base_bytes(few, 2)


def test_long_rows_leave_no_larger_holes() -> None:
    """On the CPU tensors of 8 MB have pages of their own: of longer rows only what the backward pass holds is added."""
    shape = read_shape(LLAMA_8B)
    run = replace(RUN, compute=4, tokens=2**15)
    longer, longest = (estimate(shape, replace(run, tokens=tokens), "adamw", "cpu") for tokens in (2**16, 2**17))
    before = estimate(shape, run, "adamw", "cpu")

    assert longest.workspace - longer.workspace == 2 * (longer.workspace - before.workspace)
    assert longer.workspace - before.workspace == 4 * (3 * 14336 + 2 * 4096) * 2**15


# -- devices and limits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("7.4GiB", int(7.4 * 2**30)), ("900 mb", 9 * 10**8), ("1024", 1024), ("2t", 2 * 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    """Sizes are read in decimal and binary units."""
    assert parse_size(text) == size


@given(st.text("0123456789.kKmMgGtTiIbB -", max_size=12))
def test_any_text_is_a_size_or_an_error(text: str) -> None:
    """No text makes the reader of sizes fail otherwise than with an error for people."""
    try:
        size = parse_size(text)
    except InputError:
        return
    assert 1 <= size < 2**60


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of 24GB has 24 GiB, RAM is decimal; without either it is the free RAM where there is no GPU."""
    assert find_device("24GB") == Device("cuda", 24 * 2**30, "GPU of 24GB", 24 * 2**30)
    assert find_device(None, "24GB").memory == 24 * 10**9
    with pytest.raises(InputError, match="exclude each other"):
        find_device("1GB", "1GB")
    monkeypatch.setenv("QHUB_DEVICE", "cpu")
    assert find_device().kind == "cpu"
    assert 0 < find_device().memory <= 1.1 * available_memory()


@pytest.mark.parametrize(
    "device", [Device("cuda", 12 * 2**30, "", 12 * 2**30), Device("cpu", 12 * 10**9, "", 12 * 10**9)]
)
@pytest.mark.parametrize("checkpointed", [True, False])
def test_the_largest_row_is_the_largest(device: Device, checkpointed: bool) -> None:
    """The longest row that is promised fits, and one token more does not."""
    shape = replace(read_shape(LLAMA_8B), vocabulary=32000)
    run = replace(RUN, is_checkpointed=checkpointed)
    most = largest_tokens(shape, run, "paged_adamw_8bit", device)

    def total(tokens: int) -> int:
        tried = replace(run, tokens=tokens, labels=max(1, round(tokens / 4)))
        return estimate(shape, tried, "paged_adamw_8bit", device.kind).total

    assert most > 100
    assert total(most) <= device.memory < total(most + 1)


# -- rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [[], ["train.micro_batch_size=2"], ["train.packed_tokens=0"], ["adapter.dropout=0.1"]]
)
def test_rows_are_those_of_the_trainer(tiny_base: BaseInfo, tmp_path: Path, changes: list[str]) -> None:
    """The largest row of the plan is the largest the trainer makes, and epochs have as many tokens."""
    write_recipe(tmp_path)
    recipe = load_recipe(tmp_path / "recipe.toml", ["train.batch_size=16", *changes])
    examples = read_examples(recipe, tiny_base.folder)
    planned = pack_examples(examples, recipe, False)
    model = with_adapter(load_base(tiny_base), recipe)
    rows = Sft(model, examples, recipe).rows(examples)

    assert planned.row_tokens >= max(row.input_ids.shape[1] for row in rows)
    assert planned.row_labels >= max(row.num_labels for row in rows)
    assert planned.computed == pytest.approx(sum(row.input_ids.shape[1] for row in rows), rel=0.05)
    assert planned.rows == len(rows)
    assert planned.is_packed == any(not row.layout.is_single for row in rows)


def test_a_model_that_is_not_there(home: Home, tmp_path: Path) -> None:
    """A config.json alone is planned with estimated tokens: 70B on 48 GB with checkpointing, not without it."""
    (tmp_path / "config.json").write_text(
        json.dumps({**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64})
    )  # fmt: skip
    path = write_recipe(tmp_path)
    device = find_device("48GB")
    changes = ["train.activation_checkpointing=true", "adapter.rank=16"]
    planned = plan(load_recipe(path, changes), home, device, tmp_path / "config.json")

    assert planned.rows.is_estimated
    assert planned.fits
    assert planned.shape.num_parameters == pytest.approx(70.55e9, rel=0.01)
    assert not plan(load_recipe(path, changes), home, find_device("24GB"), tmp_path).fits


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LLAMA_8B, "num_local_experts": 8}, "mixture of experts"),
        (
            {**LLAMA_8B, "model_type": "qwen3_moe", "num_experts": 8, "mlp_only_layers": [0]},
            "only some layers of this qwen3_moe have experts.*`qhub train --dry-run`",
        ),
        ({**LLAMA_8B, "hidden_size": "big"}, "hidden_size must be a whole number"),
        ({**LLAMA_8B, "vocab_size": 0}, "vocab_size must be"),
        ({}, "hidden_size must be"),
    ],
)
def test_configs_that_cannot_be_planned(config: dict, message: str) -> None:
    """A config without what counts, or of another kind of model, is refused with its reason."""
    with pytest.raises(InputError, match=message):
        read_shape(config)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    """A missing file, and one that is not a JSON object, are errors."""
    with pytest.raises(NotFound):
        read_config(tmp_path)
    for text in ("[]", "{", "\0"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(BadFile):
            read_config(tmp_path)


def test_other_families_are_counted_as_llamas() -> None:
    """A family that is not known is counted as a llama, and said to be."""
    shape: Shape = read_shape({**LLAMA_8B, "model_type": "newcomer"})

    assert not shape.is_known
    assert shape.linear_size == read_shape(LLAMA_8B).linear_size


# -- the verb ------------------------------------------------------------------------------------------


def test_the_verb(tiny_base: BaseInfo, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`qhub plan` exits with 0 where the run fits and 1 where it does not, as a table and as JSON."""
    monkeypatch.setattr(check, "DIVIDES", (2, 0))  # whatever torch this is
    path = str(write_recipe(tmp_path))
    fits = CliRunner().invoke(command, [path, "--ram", "8GB", "--json"], standalone_mode=False)
    not_fits = CliRunner().invoke(command, [path, "--ram", "100MB"], standalone_mode=False)
    gpu = CliRunner().invoke(command, [path, "--gpu", "8GB", "--set", "train.batch_size=4"], standalone_mode=False)
    said = json.loads(fits.output)

    assert (fits.return_value, not_fits.return_value, gpu.return_value) == (0, 1, 0)
    assert said["fits"]
    assert said["bytes"]["total"] + said["bytes"]["headroom"] == 8 * 10**9
    assert said["time"]["seconds"] > 0
    assert "Does not fit" in not_fits.output
    assert "GPU figures are computed" in gpu.output
    one, two, parts = (
        json.loads(CliRunner().invoke(command, [path, "--gpu", "8GB", "--json", *more], standalone_mode=False).output)
        for more in ([], ["--nproc", "2"], ["--nproc", "2", "--shard-base"])
    )
    assert [(said["processes"], said["shards"]) for said in (one, two, parts)] == [(1, 1), (2, 1), (2, 2)]
    assert two["rows"]["rows"] > one["rows"]["rows"]  # each has its share of a batch
    assert two["time"]["seconds"] <= one["time"]["seconds"]
    shared = CliRunner().invoke(command, [path, "--ram", "8GB", "--nproc", "2"], standalone_mode=False).output
    assert "CPU with 8GB, divided by 2" in shared
    assert "With --shard-base each process takes" in shared
    with pytest.raises(InputError, match="there is one: add --nproc 2"):
        CliRunner().invoke(command, [path, "--shard-base"], standalone_mode=False, catch_exceptions=False)
    with pytest.raises(InputError, match="'wide' is not a linear layer"):
        CliRunner().invoke(
            command, [path, "--set", 'adapter.target_modules=["wide"]'], standalone_mode=False, catch_exceptions=False
        )
