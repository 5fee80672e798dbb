"""The plan of a run: what it takes, whether that fits the device, and the largest rows and examples that would."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub_local.base.bases import find_base
from adapterhub_local.plan.activations import Pass
from adapterhub_local.plan.device import Device
from adapterhub_local.plan.memory import Memory, estimate
from adapterhub_local.plan.rows import Rows, computed_of, pack_examples, read_examples
from adapterhub_local.plan.shape import Shape, read_config
from adapterhub_local.plan.speed import Duration, duration
from adapterhub_local.recipe import Recipe
from adapterhub_local.recipe.derived import compute_on, num_epochs, num_steps, optimizer_on
from adapterhub_local.rows.bounds import drawn_tokens
from adapterhub_local.settings import Home

MAX_TOKENS = 2**22


@dataclass(frozen=True)
class Plan:
    """What a run of a recipe takes on a device.

    longest_example: tokens of the longest single example that fits. largest_row: tokens of the largest row
    of several examples. largest_batch: examples of mean length in such a row, so many at once.
    """

    shape: Shape
    device: Device
    run: Pass
    optimizer: str
    rows: Rows
    memory: Memory
    longest_example: int
    largest_row: int
    largest_batch: int
    duration: Duration
    choices: tuple[Any, ...] = ()  # what `strategy = "auto"` chose
    num_processes: int = 1  # each with a device of its own; all but `duration` is of one of them

    @property
    def headroom(self) -> int:
        return self.device.memory - self.memory.total

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    def to_json(self) -> dict[str, Any]:
        return {
            "fits": self.fits,
            "device": vars(self.device),
            "model": {
                "model_type": self.shape.model_type,
                "num_parameters": self.shape.num_parameters,
                "num_quantised": self.shape.linear_size,
                "is_known": self.shape.is_known,
            },
            "bytes": {**self.memory.to_json(), "headroom": self.headroom},
            "rows": self.rows.to_json(),
            "processes": self.num_processes,
            "shards": self.run.shards,
            "optimizer": self.optimizer,
            "compute": "bfloat16" if self.run.compute == 2 else "float32",
            "longest_example": self.longest_example,
            "largest_row": self.largest_row,
            "largest_batch": self.largest_batch,
            "time": self.duration.to_json(),
            "is_measured": self.device.kind == "cpu",
            "choices": [choice.to_json() for choice in self.choices],
        }


def plan(
    recipe: Recipe,
    home: Home,
    device: Device,
    base_config: Path | None = None,
    *,
    num_processes: int = 1,
    shard_base: bool = False,
) -> Plan:
    """Plan `recipe` for `device`. `base_config` stands for a base that is not there: a config.json or its folder.

    num_processes: with a device each, which divide the base between them if `shard_base`.

    Raises InputErrors of base, config and data.
    """
    folder = None if base_config else find_base(recipe.base.name, home).folder
    shape = read_config(base_config or folder)  # type: ignore[arg-type]  # one of them is a path
    examples = computed_of(read_examples(recipe, folder, shape.max_length), recipe)
    chosen: tuple[Any, ...] = ()
    if recipe.train.strategy == "auto":
        from adapterhub_local.plan.auto import choose

        shards = num_processes if shard_base else 1
        recipe, _, choices = choose(recipe, shape, device, examples, folder is None, shards)
        chosen = tuple(choices)
    rows = pack_examples(examples, recipe, folder is None, num_processes)
    return replace(plan_rows(recipe, shape, device, rows, num_processes, shard_base=shard_base), choices=chosen)


def plan_rows(
    recipe: Recipe, shape: Shape, device: Device, rows: Rows, num_processes: int = 1, *, shard_base: bool = False
) -> Plan:
    """The plan once the rows are known."""
    run = pass_of(recipe, device, rows, num_processes if shard_base else 1)
    if run.shards > 1:  # what the reference makes of an item is not kept from one epoch to the next
        rows = replace(rows, referred=round(rows.referred * num_epochs(rows.examples, recipe.train)))
    optimizer = optimizer_on(recipe.train.optimizer, device.kind)
    longest = largest_tokens(shape, replace(run, is_packed=False), optimizer, device)
    largest_row = largest_tokens(shape, replace(run, is_packed=True), optimizer, device)
    rest = max(1, rows.mean - rows.shared)
    steps = num_steps(rows.examples, recipe.train)
    time = duration(shape, rows, run, steps, num_epochs(rows.examples, recipe.train), device)
    if recipe.train.objective == "grpo":
        time = replace(time, basis=f"{time.basis}; about as long again for drawing the answers")
    if num_processes > 1:
        basis = f"{time.basis}; shared by {num_processes} processes, without what they tell each other"
        shared = round(time.seconds / num_processes, 3)
        time = replace(
            time, seconds=shared, tokens_per_second=round(time.tokens_per_second * num_processes, 1), basis=basis
        )
    return Plan(
        shape=shape,
        device=device,
        run=run,
        optimizer=optimizer,
        rows=rows,
        memory=estimate(shape, run, optimizer, device.kind),
        longest_example=min(longest, shape.max_length),  # the base has no positions for more
        largest_row=largest_row,
        largest_batch=max(0, (largest_row - rows.shared) // rest),
        duration=time,
        num_processes=num_processes,
    )


def _drawn(recipe: Recipe, rows: Rows) -> int:
    """Tokens whose keys and values are held for drawn answers."""
    reward = recipe.reward
    if recipe.train.objective != "grpo":
        return 0
    longest = max(0, (rows.longest or rows.row_tokens) - reward.samples * reward.max_tokens)
    return drawn_tokens(reward.samples, reward.max_tokens, longest, recipe.data.max_length + reward.max_tokens)


def pass_of(recipe: Recipe, device: Device, rows: Rows, shards: int = 1) -> Pass:
    """The largest forward and backward pass of the run, of a base that `shards` processes divide."""
    adapter, train = recipe.adapter, recipe.train
    targets = (adapter.target_modules,) if isinstance(adapter.target_modules, str) else adapter.target_modules
    compute = compute_on(train.compute, device.kind, has_bfloat16=device.has_bfloat16)
    return Pass(
        tokens=rows.row_tokens,
        labels=rows.row_labels,
        is_packed=rows.is_packed,
        compute=2 if compute == "bfloat16" else 4,
        factor=2 if adapter.dtype == "bfloat16" else 4,
        rank=adapter.rank,
        targets=targets,
        has_dropout=adapter.dropout > 0,
        is_checkpointed=bool(train.activation_checkpointing),
        is_offloaded=train.activation_checkpointing == "offload" and device.kind == "cuda",
        longest=rows.longest,
        drawn=_drawn(recipe, rows),
        trained_tokens=len(adapter.train_tokens or ()),
        shards=shards,
    )


def largest_tokens(shape: Shape, run: Pass, optimizer: str, device: Device) -> int:
    """The most tokens a row can have on the device, with labels in the same proportion; 0 if not even one fits."""
    share = run.labels / run.tokens

    def fits(tokens: int) -> bool:
        tried = replace(run, tokens=tokens, labels=max(1, round(tokens * share)))
        return estimate(shape, tried, optimizer, device.kind).total <= device.memory

    low, high = 0, MAX_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
