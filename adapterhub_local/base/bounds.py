"""The small files of a foreign model, held against bounds before transformers believes them. No torch.

A config is code's input: a number of layers is a loop, a number of labels a table, a nested list a stack.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterhub_local.errors import BadFile
from adapterhub_local.recipe.template_file import LONGEST
from adapterhub_local.regular import read_regular

MAX_LAYERS, MAX_COUNT, MAX_NUMBER = 512, 65_536, 1 << 40
MAX_EXPERTS = 512  # of a layer, where a checkpoint has fewer tensors than experts: it may hold them joined
MAX_DEPTH, MAX_VALUES = 32, 200_000  # of a config
MAX_GROWTH = 64  # of a text in the tokenizer's own replacements
MAX_STEPS = 64  # of a normaliser
LIMITS = {  # file of a model -> bytes; the largest tokenizers have 35 MB
    "config.json": 1 << 20,
    "generation_config.json": 1 << 20,
    "tokenizer_config.json": 16 << 20,
    "special_tokens_map.json": 4 << 20,
    "added_tokens.json": 16 << 20,
    "model.safetensors.index.json": 25_000_000,
    "tokenizer.json": 64 << 20,
    "vocab.json": 64 << 20,
    "merges.txt": 64 << 20,
    "tokenizer.model": 64 << 20,
    "chat_template.jinja": LONGEST,
}
# what transformers makes one of for each; sizes and positions only allocate, which nothing does before the weights fit
_COUNTS = re.compile(r"(?:^|_)(?:num|n)_(?!positions|ctx|embd|embeddings|inner|vocab|hidden_size)|expert|label")
_LAYERS = re.compile(r"layer|block_count$")
_HIDDEN = re.compile(r"(?:num_hidden_layers|n_layers?|num_layers|block_count)$")
_EXPERTS = re.compile(r"(?:num|n)_\w*experts$|expert_count$")


def check_files(folder: Path) -> None:
    """Raise BadFile for a file of the model that is too long, is not a file, or is not JSON within bounds."""
    for name, limit in LIMITS.items():
        if not (folder / name).exists():
            continue
        fields = _read(folder / name, limit) if name.endswith(".json") else None
        if name.endswith("config.json"):
            if not isinstance(fields, dict):
                raise BadFile(f"{folder / name} is not a JSON object")
            check_settings(fields, str(folder / name), is_tokenizer=name == "tokenizer_config.json")
        elif name == "tokenizer.json":
            check_tokenizer(fields, str(folder / name))
        elif fields is None:
            _bytes(folder / name, limit)


def check_settings(
    fields: dict[str, Any], where: str, *, num_tensors: int | None = None, is_tokenizer: bool = False
) -> None:
    """Raise BadFile for a setting that no model has: it would be a loop without end, or no number at all.

    `num_tensors` is how many the checkpoint has, if that is known: a layer has one at least. Of a tokenizer's
    settings only the depth is looked at: its numbers do not drive loops, and 10^30 is how transformers says "no limit".
    """
    counted, layers, experts = 0, 1, 1
    for key, value, depth in _values(fields):
        counted += 1
        if depth > MAX_DEPTH or counted > MAX_VALUES:
            raise BadFile(f"{where} is nested too deeply or has too many values: it is not a model's")
        if is_tokenizer or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if isinstance(value, float):
            if math.isnan(value) or (math.isinf(value) and key != "time_step_limit"):
                raise BadFile(f"{where}: {key[:60]} is not a finite number")
            continue
        most = MAX_LAYERS if _LAYERS.search(key) else MAX_COUNT if _COUNTS.search(key) else MAX_NUMBER
        if abs(value) > most:
            raise BadFile(f"{where}: {key[:60]} is {_shown(value)}, more than the {most:,} of any model")
        layers = max(layers, value) if _HIDDEN.search(key) else layers
        experts = max(experts, value) if _EXPERTS.search(key) else experts
        if num_tensors is not None and _HIDDEN.search(key) and value > num_tensors:
            raise BadFile(f"{where} says {key[:60]} = {value:,}, and the checkpoint has {num_tensors:,} tensors")
    if num_tensors is not None and experts > MAX_EXPERTS and experts > num_tensors:
        raise BadFile(f"{where} says {experts:,} experts, and the checkpoint has {num_tensors:,} tensors")
    if layers * experts > MAX_COUNT:
        raise BadFile(f"{where}: {layers:,} layers of {experts:,} experts each are more than any model has")


def check_tokenizer(fields: Any, where: str) -> None:
    """Raise BadFile for a tokenizer whose own replacements make a short text long without end."""
    if not isinstance(fields, dict):
        raise BadFile(f"{where} is not a JSON object")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        growth = 1
        for steps, (key, value, depth) in enumerate(_values(fields.get(part))):
            if depth > MAX_DEPTH or steps > MAX_VALUES:
                raise BadFile(f"{where}: its {part} is nested too deeply")
            if key == "content" and isinstance(value, str) and part in ("normalizer", "decoder"):
                growth *= max(1, len(value))
                if growth > MAX_GROWTH or steps > MAX_STEPS * 8:
                    raise BadFile(f"{where}: its {part} makes a text more than {MAX_GROWTH} times as long")


def _values(value: Any) -> Iterator[tuple[str, Any, int]]:
    """Every value inside, with the key it is under and how deep it is; without a stack of calls."""
    left = [("", value, 0)]
    while left:
        key, value, depth = left.pop()
        if isinstance(value, dict):
            left += [(str(name), part, depth + 1) for name, part in value.items()]
        elif isinstance(value, list):
            left += [(key, part, depth + 1) for part in value]
        yield key, value, depth


def _read(path: Path, limit: int) -> Any:
    try:
        return json.loads(_bytes(path, limit))
    except RecursionError:
        raise BadFile(f"{path} is nested too deeply: it is not a model's") from None
    except ValueError as error:
        raise BadFile(f"{path} cannot be read, it is not JSON: {str(error)[:100]}") from None


def _bytes(path: Path, limit: int) -> bytes:
    try:
        return read_regular(path, limit)
    except OSError as error:
        raise BadFile(f"{path} cannot be used: {error.strerror or error}") from None


def _shown(number: int) -> str:
    return f"{number:,}" if abs(number) < 10**18 else "a number of many digits"
