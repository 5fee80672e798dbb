"""What can fail is tried in the first seconds: masks, one step, writing and reading the factors, room on the disk."""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from adapterhub_local.counts import counted
from adapterhub_local.durable import staging
from adapterhub_local.errors import BadData, Corrupt, InputError, QhubError
from adapterhub_local.lora.header import read_header
from adapterhub_local.lora.write import write_safetensors
from adapterhub_local.rows.example import Item, num_labels, num_tokens
from adapterhub_local.settings import Home, make_folder
from adapterhub_local.train.adapter import factors_of, random_devices, read_factors
from adapterhub_local.train.trainer import AdapterTrainer

COPIES = 8  # of the factors on the disk at worst: two checkpoints of three (weights, two moments), best, result


@dataclass(frozen=True)
class Preflight:
    """What one step showed. Counts are of the whole training data; `row_seconds` is one forward and backward pass."""

    examples: int
    tokens: int
    labels: int
    longest: int
    steps: int
    num_parameters: int
    row_tokens: int
    row_seconds: float
    loss: float

    def to_json(self) -> dict[str, Any]:
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def preflight(trainer: AdapterTrainer, examples: Sequence[Item], home: Home) -> Preflight:
    """Try one step on the longest of the data, and the round trip of the factors through a file.

    On a GPU the row is the largest that a batch can give, so that what does not fit is known now. Changes
    neither factors nor random state. Raises InputError or QhubError with what to do.
    """
    model = trainer.adapted
    factors = factors_of(model)
    size = sum(factor.numel() * 4 for factor in factors.values())
    make_folder(home.root)
    room = shutil.disk_usage(home.runs if home.runs.is_dir() else home.root).free
    if room < COPIES * size:
        raise InputError(
            f"{home.runs} has {room >> 20} MB left, the run needs up to "
            f"{(COPIES * size >> 20) + 1} MB for checkpoints: free some space or set QHUB_HOME to another disk"
        )
    for number, example in enumerate(examples, 1):
        if not num_labels(example):
            raise BadData(f"training example {number} has no answer token to learn")
    longest = sorted(examples, key=lambda example: -num_tokens(example))
    batch = longest[: trainer.args.per_device_train_batch_size] if model.device.type == "cuda" else longest[:1]
    collate: Any = trainer.data_collator
    rows = collate(batch)["rows"]
    row = max(rows, key=lambda row: row.num_tokens)
    model.train()
    with torch.random.fork_rng(devices=random_devices(model)):
        start = time.perf_counter()
        try:
            loss, _ = trainer.objective.loss(row, trainer.objective.begin([row], [row], lambda tensor: tensor))
            loss.backward()
        except torch.OutOfMemoryError as error:
            raise QhubError(
                f"a row of {counted(row.num_tokens, 'token')} does not fit into the GPU's memory: lower "
                "train.packed_tokens, train.micro_batch_size or data.max_length, or set "
                f"train.activation_checkpointing ({error})"
            ) from None
        value = loss.item()
        seconds = time.perf_counter() - start
    total = math.sqrt(sum(float(factor.grad.norm()) ** 2 for factor in factors.values() if factor.grad is not None))
    model.zero_grad()
    if not (math.isfinite(value) and math.isfinite(total)):
        raise QhubError(
            f"the first loss is {value} and its gradient {total}: the base or its compute dtype is not sound"
        )
    if total == 0 and not trainer.objective.may_rest:
        raise QhubError("the first gradient is zero: nothing would be learned with these target modules")
    try:
        with staging(home.tmp) as folder:
            _round_trip(factors, folder / "factors.safetensors")
    except (OSError, SafetensorError) as error:
        raise QhubError(
            f"{home.tmp} cannot hold the factors ({(size >> 20) + 1} MB): {getattr(error, 'strerror', None) or error}: "
            "free some space or set QHUB_HOME to another disk"
        ) from None
    tokens = sum(map(num_tokens, examples))
    steps = trainer.args.max_steps
    return Preflight(
        examples=len(examples),
        tokens=tokens,
        labels=sum(map(num_labels, examples)),
        longest=num_tokens(longest[0]),
        steps=steps,
        num_parameters=sum(factor.numel() for factor in factors.values()),
        row_tokens=row.num_tokens,
        row_seconds=seconds,
        loss=value,
    )


def _round_trip(factors: dict[str, torch.nn.Parameter], path: Path) -> None:
    shapes = {name: (factor.dtype, tuple(factor.shape)) for name, factor in factors.items()}
    write_safetensors(path, shapes, ((name, factor.detach()) for name, factor in factors.items()), {"format": "pt"})
    read_header(path)
    for name, tensor in read_factors(path):
        if not torch.equal(tensor, factors[name].detach().cpu()):
            raise Corrupt(f"{name} changed when it was written and read back: the disk under {path.parent} is bad")
