"""`strategy = "auto"`: what the recipe leaves open is chosen for the model, the device and the data, with the reason.

What the recipe gives stays as it is. Choices depend on the memory a device has, not on what happens to be free,
so one machine gives one adapter. Every base is in 4 bits, so the strategy is always QLoRA.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from adapterhub_local.base.bases import find_base
from adapterhub_local.counts import counted
from adapterhub_local.errors import InputError
from adapterhub_local.plan.device import Device, find_device
from adapterhub_local.plan.memory import estimate, num_factors
from adapterhub_local.plan.rows import Rows, computed_of, pack_examples, read_examples
from adapterhub_local.plan.run_plan import pass_of
from adapterhub_local.plan.shape import Shape, read_config
from adapterhub_local.recipe import Recipe
from adapterhub_local.recipe.derived import optimizer_on
from adapterhub_local.recipe.schema import CHECKPOINTING
from adapterhub_local.settings import Home

# parameters up to -> rank, alpha, learning rate, batch: between the published values of QLoRA (arXiv 2305.14314: 2e-4,
# 1e-4 from 33B), Unsloth, and Thinking Machines' "LoRA Without Regret" (batches below 32)
BY_SIZE = (
    (0.75e9, 8, 16, 5e-4, 8),
    (5e9, 16, 32, 3e-4, 16),
    (20e9, 16, 32, 2e-4, 16),
    (math.inf, 32, 32, 1e-4, 16),
)
MAX_RANK = 64
MIN_STEPS = 16  # of an epoch, so that a schedule has a course
BITS_PER_FACTOR, BITS_PER_LABEL = 2, 1  # what A and B can hold, and what an answer's token has to teach
ROOM = {
    False: "there is room for the activations of all layers",
    True: "there is no room for the activations of all layers",
    "offload": "there is not even room for the inputs of all layers",
}
STATES = {
    (False, "cpu"): "8-bit states cost time on a CPU",
    (False, "cuda"): "8-bit states, which can move to the host",
    (True, "cuda"): "there is room for its states, and 8-bit ones take a launch a factor",
}
USED = 0.9  # share of the device a choice may take: the estimate has an error, and others have needs


@dataclass(frozen=True)
class Choice:
    """One key that was left open, what it became, and why."""

    key: str
    value: Any
    reason: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.key} = {value}: {self.reason}"


def settle(recipe: Recipe, home: Home, shards: int = 1) -> tuple[Recipe, list[Choice]]:
    """The recipe as it will run here; itself, without choices, unless its strategy is `auto`.

    shards: processes that divide the base between them.

    The settled recipe says everything and chooses nothing any more. Raises InputErrors of base and data, and
    InputError where nothing fits.
    """
    if recipe.train.strategy != "auto":
        return recipe, []
    folder = find_base(recipe.base.name, home).folder
    shape = read_config(folder)
    examples = computed_of(read_examples(recipe, folder, shape.max_length), recipe)
    settled, _, choices = choose(recipe, shape, find_device(), examples, False, shards)
    return settled, choices


def choose(
    recipe: Recipe, shape: Shape, device: Device, examples: Sequence[Any], is_estimated: bool, shards: int = 1
) -> tuple[Recipe, Rows, list[Choice]]:
    """The recipe with every open key chosen, its rows, and the choices. Raises InputError where nothing fits."""
    choices: list[Choice] = []
    size = shape.num_parameters
    rank, alpha, rate, batch = next(row[1:] for row in BY_SIZE if size <= row[0])
    family = f"for a model of {size / 1e9:.2g} billion parameters"

    def settled(key: str, value: Any, reason: str) -> None:
        nonlocal recipe
        table, _, name = key.partition(".")
        if key not in recipe.origins:
            recipe = replace(recipe, **{table: replace(getattr(recipe, table), **{name: value})})
            choices.append(Choice(key, value, reason))

    labels = sum(part.num_labels for example in examples for part in example.parts)
    targets = pass_of(recipe, device, _nothing()).targets
    enough = rank
    while enough < MAX_RANK and num_factors(shape, enough, targets) * BITS_PER_FACTOR < labels * BITS_PER_LABEL:
        enough *= 2
    why = family if enough == rank else f"{counted(labels, 'answer token')} can teach more than rank {rank} can hold"
    settled("adapter.rank", enough, why)
    settled("adapter.alpha", float(alpha * recipe.adapter.rank / rank), f"scaling {alpha / rank:g}")
    settled("train.learning_rate", rate, family)
    fewer = max(1, 2 ** int(math.log2(max(1, len(examples) / MIN_STEPS))))
    why = (
        family if batch <= fewer else f"with it {counted(len(examples), 'example')} can make {MIN_STEPS} steps an epoch"
    )
    if recipe.train.micro_batch_size is None:
        settled("train.batch_size", min(batch, fewer), why)
    limit = USED * device.whole
    for (packed, checkpointed, why), optimizer in itertools.product(_ways(recipe, device), _optimizers(recipe, device)):
        tried = replace(
            recipe, train=replace(recipe.train, packed_tokens=packed, activation_checkpointing=checkpointed)
        )
        rows = pack_examples(examples, tried, is_estimated)
        total = estimate(shape, pass_of(tried, device, rows, shards), optimizer, device.kind).total
        if total <= limit:
            settled("train.optimizer", optimizer, STATES[device.kind == "cuda" and optimizer == "adamw", device.kind])
            taken = f"{total / 1e9:.2f} of {device.whole / 1e9:.1f} GB"
            settled("train.packed_tokens", packed, f"{why} ({taken})")
            settled("train.activation_checkpointing", checkpointed, ROOM[checkpointed])
            return replace(recipe, train=replace(recipe.train, strategy="manual")), rows, choices
    raise InputError(
        f"{device.name} has {device.whole / 1e9:.1f} GB and the smallest way takes {total / 1e9:.1f} GB: "
        "use a smaller base, shorter examples (data.max_length) or a smaller adapter.rank"
    )


def _ways(recipe: Recipe, device: Device) -> Iterator[tuple[int, bool | str, str]]:
    """packed_tokens and activation_checkpointing from the fastest to the smallest, given keys kept; and why."""
    longest, reason = (1024, "longer rows take more memory and save a CPU nothing")
    if device.kind == "cuda":
        longest, reason = (4096, "long rows keep a GPU busy")
    train, given = recipe.train, recipe.origins
    lengths = (train.packed_tokens,) if "train.packed_tokens" in given else (longest, longest // 2, longest // 4, 0)
    ways: tuple[bool | str, ...] = CHECKPOINTING if device.kind == "cuda" else CHECKPOINTING[:2]
    if "train.activation_checkpointing" in given:
        ways = (train.activation_checkpointing,)
    for checkpointed in ways:
        for length in lengths:
            yield length, checkpointed, reason if length == longest else "longer rows do not fit"


def _optimizers(recipe: Recipe, device: Device) -> tuple[str, ...]:
    """The optimizers to try, the fastest first: the states of the 8-bit one are smaller, but each factor a launch."""
    usual = optimizer_on(recipe.train.optimizer, device.kind)
    return ("adamw", usual) if recipe.train.optimizer == "auto" and device.kind == "cuda" else (usual,)


def _nothing() -> Rows:
    return Rows(1, 1, 1, 0, 1, 1, 1, 1, 1, 1, is_packed=False, is_estimated=True)
