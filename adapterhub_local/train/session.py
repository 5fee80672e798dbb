"""All that a run needs, read, loaded and checked, before anything is written."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.chat_template import stop_tokens
from adapterhub_local.base.load import choose_device, compute_dtype, load_base
from adapterhub_local.base.model import AdaptedModel
from adapterhub_local.data.dataset import Dataset, read_data
from adapterhub_local.errors import InputError
from adapterhub_local.evaluate.evaluate import Checks
from adapterhub_local.evaluate.tool_calls import offers_of
from adapterhub_local.progress import Reporter
from adapterhub_local.recipe import Recipe
from adapterhub_local.recipe.derived import data_within
from adapterhub_local.recipe.objectives import OBJECTIVES
from adapterhub_local.rows.example import Item, Tokenised, parts_of
from adapterhub_local.rows.examples import settings_of
from adapterhub_local.rows.judged import tokenise_items
from adapterhub_local.settings import Home, is_sharded, process
from adapterhub_local.train.adapter import with_adapter
from adapterhub_local.train.check import check_code, check_processes, check_run
from adapterhub_local.train.heap import map_large_tensors
from adapterhub_local.train.launch import join
from adapterhub_local.train.liger import use_liger
from adapterhub_local.train.run_folder import Run
from adapterhub_local.train.shards import divide
from adapterhub_local.train.statistics import check_ids
from adapterhub_local.train.tokens import check_seen, ids_of


@dataclass(frozen=True)
class Session:
    """All that a run needs, loaded and checked; nothing has been written."""

    run: Run
    model: AdaptedModel
    tokenizer: PreTrainedTokenizerBase
    examples: list[Item]
    tests: list[Item]
    counts: dict[str, Any]  # what became of examples that were too long
    checks: Checks | None = None  # what is asked of held-out answers beside their loss


@dataclass(frozen=True)
class Inputs:
    """What decides a run, read and checked without loading the base."""

    run: Run
    dataset: Dataset
    shard_base: bool = False  # each of several processes holds a part of the base


def read_inputs(recipe: Recipe, home: Home, reporter: Reporter, *, shard_base: bool = False) -> Inputs:
    """Hold the recipe against base and parent, and read its data. Raises their InputErrors."""
    if is_sharded():
        raise InputError(
            "accelerate cannot shard this base: its 4-bit weights are stored as uint8, with which its FSDP crashes or "
            "trains with a loss of 0 (huggingface/accelerate#3983). Leave it out: --nproc 2 --shard-base divides a base"
        )
    check_processes(recipe, process().world_size, shard_base=shard_base)
    if process().world_size > 1 and choose_device() == "cuda":
        if process().local_rank >= torch.cuda.device_count():
            raise InputError(f"--nproc asks for more GPUs than the {torch.cuda.device_count()} of this machine")
        torch.cuda.set_device(process().local_rank)
    check_code(recipe)
    info, start = check_run(recipe, home)
    dataset = read_data(recipe)
    for note in dataset.notes:
        reporter.note(note)
    return Inputs(Run(recipe, info, home, dataset, start), dataset, shard_base)


def load(inputs: Inputs, reporter: Reporter) -> Session:
    """Load the base, tokenise the data, put the adapter on the base."""
    run, dataset = inputs.run, inputs.dataset
    recipe, info = run.recipe, run.info
    reporter.note(f"base {info.name}: loading")
    if choose_device() == "cpu":
        map_large_tensors()
    device = choose_device()
    # what is to be divided is read into host memory, where processes share the pages of its file
    base = load_base(
        info,
        dtype=compute_dtype(recipe.train.compute),
        device="cpu" if inputs.shard_base else device,
        note=reporter.note,
    )
    shape, group = OBJECTIVES[recipe.train.objective].shape, recipe.train.batch_size
    stops = stop_tokens(info.folder, base.tokenizer)
    data = data_within(recipe.data, info.max_length)
    tokenised, held_out = tokenise_items(dataset, base.tokenizer, data, shape, group, stops)
    for part in (tokenised, held_out):
        for note in part.notes() if part else ():
            reporter.note(note)
    items, tests = list(tokenised.items), list(held_out.items) if held_out else []
    check_ids([*items, *tests], base.tokenizer, base.model.get_input_embeddings().weight.shape[0])
    if recipe.adapter.train_tokens:
        rows = base.model.get_input_embeddings().weight.shape[0]
        check_seen(recipe, ids_of(recipe.adapter.train_tokens, base.tokenizer, rows, info.name), items)
    if recipe.train.eval_every and not tests:
        raise InputError("train.eval_every: nothing is held out to evaluate on: name a file with data.test")
    checks = _checks(recipe, held_out, base.tokenizer)
    kernels = None if inputs.shard_base else use_liger(base.model, parts_of(items)[0], recipe.train.kernels)
    model = with_adapter(base, recipe, start=run.start, examples=parts_of(items))
    join(device)
    if inputs.shard_base:
        divide(model, device)
        kernels = use_liger(model.get_base_model(), parts_of(items)[0], recipe.train.kernels)
    if kernels:
        reporter.note(kernels)
    return Session(run, model, base.tokenizer, items, tests, tokenised.counts, checks)


def _checks(recipe: Recipe, held_out: Tokenised | None, tokenizer: PreTrainedTokenizerBase) -> Checks | None:
    """What a recipe asks of the held-out answers beside their loss."""
    reward = recipe.reward if recipe.train.objective == "grpo" else None
    if held_out is None or not (recipe.eval.tool_calls or reward):
        return None
    offers = offers_of(held_out.chats, tokenizer, settings_of(recipe.data)) if recipe.eval.tool_calls else ()
    return Checks(offers=offers, max_new_tokens=recipe.eval.max_new_tokens, reward=reward)
