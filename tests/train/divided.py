"""The gradients of two steps of every case, and the bytes that are held: by one process, or by several that divide the
base. `python -m tests.train.divided FOLDER` is one of several; the first writes what it found to FOLDER."""

import gc
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from adapterhub_local.progress import Quiet
from adapterhub_local.recipe import Recipe, load_recipe
from adapterhub_local.settings import home, process
from adapterhub_local.train.adapter import factors_of
from adapterhub_local.train.session import Session, load, read_inputs
from adapterhub_local.train.shards import shards_of
from adapterhub_local.train.trainer import make_trainer
from adapterhub_local.train.watch import Watch

PAIRS, JUDGED = "pairs.jsonl", "judged.jsonl"
ALONE = ["train.packed_tokens=0", "train.batch_size=5", "data.test_share=0"]  # five rows: the second process has two
CASES: dict[str, list[str]] = {
    "kept": [],
    "checkpointed": ["train.activation_checkpointing=true"],
    "weights without factors": ["adapter.target_modules=attention"],
    "dpo": ["train.objective=dpo", f"data.train={PAIRS}"],
    "kto": ["train.objective=kto", f"data.train={JUDGED}"],
    "experts": ["base.name=experts", "train.activation_checkpointing=true"],
    "tied head": ["base.name=tied"],
}


def of_case(name: str, recipe: Path) -> Recipe:
    """The recipe of a case."""
    return load_recipe(recipe, [*ALONE, *CASES[name]])


def loaded(recipe: Recipe) -> Session:
    """The base with an adapter that changes it, divided if there are several processes."""
    session = load(read_inputs(recipe, home(), Quiet(), shard_base=process().world_size > 1), Quiet())
    generator = torch.Generator().manual_seed(0)
    for factor in factors_of(session.model).values():
        factor.data = torch.randn(factor.shape, generator=generator) * 0.05
    return session


def gradients(session: Session, folder: Path) -> dict[str, torch.Tensor]:
    """Of two steps over the same items in another order, so that each process meets items that the other has met."""
    recipe, items = session.run.recipe, session.examples[: session.run.recipe.train.batch_size]
    trainer = make_trainer(session.model, session.examples, recipe, folder, Watch(lambda entry: None))
    found = {}
    for number, batch in enumerate((items, items[1:] + items[:1])):
        trainer.training_step(session.model, {"rows": trainer.objective.rows(batch)})
        for name, factor in factors_of(session.model).items():
            assert factor.grad is not None, name
            found[f"{number} {name}"] = factor.grad.clone()
        session.model.zero_grad()
    return found


def bytes_held() -> int:
    """Bytes of all tensors of this process that are held as bytes: codes of NF4, and their 8-bit constants."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        kind = type(found)  # what stands for something else may say that it is of another
        if issubclass(kind, torch.Tensor) and not issubclass(kind, DTensor) and found.dtype == torch.uint8:
            storages[found.untyped_storage()._cdata] = found.untyped_storage().nbytes()
    return sum(storages.values())


def main(folder: Path) -> None:
    """Every case in this process, one of several."""
    torch.set_num_threads(1)
    recipe, is_leader = folder / "recipe.toml", process().is_leader
    told = {}
    for name in CASES:
        session = loaded(of_case(name, recipe))
        found = gradients(session, folder / "run")
        if is_leader:
            save_file(found, folder / f"{name}.safetensors")
        del found
        if name == "kept":
            assert shards_of(session.model) is not None
            session.examples.clear()
            told["held"] = bytes_held()
            body = session.model.get_base_model().base_model
            whole = {}
            for number, block in enumerate(body.layers):
                block.unshard()
                for key, weight in block.named_parameters():
                    if weight.dtype == torch.uint8:
                        place = f"model.layers.{number}.{key.replace('.base_layer', '')}"
                        whole[place] = weight.detach().clone()
                block.reshard()
            if is_leader:
                save_file(whole, folder / "whole.safetensors")
    if is_leader:
        (folder / "told.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
