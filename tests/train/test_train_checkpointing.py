"""What leaves for host memory: only the inputs of blocks and the table of the embeddings, and no number changes."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.base.experts import build_model
from adapterhub_local.base.load import LoadedBase, load_base
from adapterhub_local.recipe import load_recipe
from adapterhub_local.rows.examples import Example, read_chats, tokenise
from adapterhub_local.rows.packing import Packed, pack
from adapterhub_local.train import checkpointing
from adapterhub_local.train.adapter import factors_of, with_adapter
from adapterhub_local.train.checkpointing import (
    HostEmbedding,
    OnHost,
    enable_checkpointing,
    move_boundaries,
    move_embeddings,
    split_mlps,
    to_host,
)
from adapterhub_local.train.fused_lora import fuse
from adapterhub_local.train.loss import answer_loss
from adapterhub_local.train.trainer import make_trainer
from adapterhub_local.train.watch import Watch
from tests.architectures import SHAPES, in_nf4
from tests.chats import write_recipe
from tests.pretend_gpu import moved, pretend_gpu
from tests.tiny import VOCABULARY, byte_tokenizer, llama_config

EXAMPLES = [Example(tuple(range(10 + at, 50 + at)), ((30, 40),)) for at in range(2)]


def model_of(name: str, **changes):
    """A random model of an architecture with two layers, its factors neither zero nor equal."""
    kind, special = SHAPES[name]
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": VOCABULARY}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = in_nf4(build_model(kind(**sizes, **special, **ids, **changes)))
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(model, config).train()
    fuse(model)
    return model


def gradients(model, row: Packed) -> dict[str, torch.Tensor]:
    """The gradient of each factor of the row's loss."""
    answer_loss(model, row, None).backward()
    return {name: factor.grad.clone() for name, factor in factors_of(model).items()}


@pytest.mark.parametrize("name", SHAPES)
def test_only_the_inputs_of_blocks_move(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every architecture each block saves its input on the host and nothing more, with the very same gradients."""
    row = pack(EXAMPLES)
    wanted = gradients(model_of(name), row)
    model = model_of(name)
    seen: list[tuple[int, ...]] = []

    def watched(tensor: torch.Tensor) -> OnHost:
        kept = to_host(tensor)
        if not tensor.numel():  # torch 2.11 has checkpointing save one of nothing
            return kept
        seen.append(tuple(tensor.shape))
        assert [piece.numel() for piece in kept.pieces] == [1500, 1500, 1500, 620]
        return kept

    monkeypatch.setattr(checkpointing, "to_host", watched)
    monkeypatch.setattr(checkpointing, "PIECE", 6000)
    enable_checkpointing(model, True)
    move_boundaries(model)
    got = gradients(model, row)

    assert seen == [(1, row.input_ids.numel(), 64)] * 2
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)

    model.zero_grad()
    split_mlps(model, 30)  # the row has 80
    in_parts = gradients(model, row)
    assert seen == [(1, row.input_ids.numel(), 64)] * 4
    for key in wanted:
        assert (in_parts[key] - wanted[key]).norm() <= 1e-5 * wanted[key].norm(), key


def test_embeddings_of_their_own_move() -> None:
    """Rows come from the host's table with the same gradients; a table that the head shares stays where it is."""
    row = pack(EXAMPLES)
    wanted = gradients(model_of("llama"), row)
    model, tied = model_of("llama"), model_of("llama", tie_word_embeddings=True)
    for one in (model, tied):
        move_embeddings(one)
        enable_checkpointing(one, True)
        move_boundaries(one)
    got = gradients(model, row)

    assert isinstance(model.get_input_embeddings(), HostEmbedding)
    assert isinstance(tied.get_input_embeddings(), torch.nn.Embedding)
    assert not any("embed_tokens" in name for name, _ in model.named_parameters())
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_a_run_on_a_gpu(built_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended GPU `offload` moves blocks and embeddings to the host, with the losses of plain checkpointing."""
    from_gpu: list[bool] = []
    empty = torch.empty
    losses: dict[str, list[float]] = {}
    for wanted in ("true", "offload"):
        changes = ["train.optimizer=adamw", f"train.activation_checkpointing={wanted}"]
        recipe = load_recipe(write_recipe(tmp_path), changes)
        examples = tokenise(read_chats(recipe.data.train), byte_tokenizer(), 512)
        with pretend_gpu(monkeypatch), monkeypatch.context() as patch:
            torch.__future__.set_overwrite_module_params_on_conversion(True)  # PEFT moves the factors
            # a torch without GPUs has no pinned memory
            patch.setattr(torch, "empty", lambda *size, pin_memory=False, **kwargs: empty(*size, **kwargs))
            patch.setattr(
                checkpointing, "to_host", lambda tensor: (from_gpu.append(tensor.is_cuda), to_host(tensor))[1]
            )
            torch.manual_seed(0)
            base = moved(AutoModelForCausalLM.from_config(llama_config()).eval().requires_grad_(False))
            model = with_adapter(LoadedBase(read_record(built_base), base, byte_tokenizer()), recipe)
            torch.__future__.set_overwrite_module_params_on_conversion(False)
            seen = losses[wanted] = []
            watch = Watch(lambda entry, seen=seen: seen.append(entry["loss"]))
            trainer = make_trainer(model, examples, recipe, tmp_path, watch)
            trainer.train()
            assert isinstance(model.get_input_embeddings(), HostEmbedding) == (wanted == "offload")

    assert losses["offload"] == losses["true"]
    assert len(losses["true"]) == 4
    assert from_gpu == [True] * 2 * 4  # two blocks, four steps of a row


def test_a_run_with_everything_moved(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """The trainer trains and saves its state with blocks and embeddings on the host, to the bit as without."""
    recipe = load_recipe(write_recipe(tmp_path), ["train.activation_checkpointing=offload", "train.save_every=1"])
    trained = []
    for moves in (False, True):
        base = load_base(tiny_base)
        examples = tokenise(read_chats(recipe.data.train), base.tokenizer, 512)
        model = with_adapter(base, recipe)
        if moves:
            move_embeddings(model)
            assert isinstance(model.get_input_embeddings(), HostEmbedding)
        watch = Watch(lambda entry: None, save_every=1)
        trainer = make_trainer(model, examples, recipe, tmp_path / f"run-{moves}", watch)
        if moves:
            move_boundaries(model)
        trainer.train()
        trained.append({name: factor.detach().clone() for name, factor in factors_of(model).items()})
        kept = sorted(path.name for path in next((tmp_path / f"run-{moves}").glob("checkpoint-*")).iterdir())
        assert "adapter_model.safetensors" in kept

    assert all(torch.equal(trained[0][key], trained[1][key]) for key in trained[0])
