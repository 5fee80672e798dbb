"""Where an adapter's file says its scale: a config beside it or in its header, or numbers that other tools leave."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterhub_local.errors import BadFile, InputError
from adapterhub_local.lora.config import CONFIG, CONFIG_KEY, WEIGHTS, AdapterConfig
from adapterhub_local.lora.config_reader import parse_config
from adapterhub_local.lora.header import no_duplicates
from adapterhub_local.regular import read_regular

DIFFUSERS_KEY = "lora_adapter_metadata"  # diffusers >= 0.35: the fields of PEFT's config, in JSON
_ALPHAS = ("ss_network_alpha", "lora_alpha", "alpha", "network_alpha")  # of the whole file, as text
_RANKS = ("ss_network_dim", "r", "rank", "lora_rank")
MAX_CONFIG_BYTES = 16 << 20


class AlphaKnown(InputError):
    """An alpha was given for what says its own."""


def config_beside(weights: Path) -> Path | None:
    """The `adapter_config.json` that belongs to the file: beside PEFT's own name, or the only weights in its folder."""
    beside = weights.parent / CONFIG
    if not beside.is_file():
        if beside.exists() and weights.name == WEIGHTS:
            raise BadFile(f"{beside} is not a file")
        return None
    if weights.name == WEIGHTS or len(list(weights.parent.glob("*.safetensors"))) == 1:
        return beside
    return None


def read_config(weights: Path, metadata: Mapping[str, str], *, dora: bool, tokens: bool) -> AdapterConfig | None:
    """The config that the file says, whole: beside it, or in its header. Raises BadFile for one that is refused."""
    beside = config_beside(weights)
    if beside is not None:
        return parse_config(_bytes(beside), str(beside), dora=dora, tokens=tokens)
    if CONFIG_KEY in metadata:
        return parse_config(metadata[CONFIG_KEY], f"{weights} (its header)", dora=dora, tokens=tokens)
    return None


def _bytes(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_CONFIG_BYTES)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}") from None


def settings_in_header(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """What a header without a whole config says of the scale, as fields of PEFT's config; {} if nothing.

    Raises BadFile for what is there and cannot be read.
    """
    if DIFFUSERS_KEY in metadata:
        return _of_diffusers(metadata[DIFFUSERS_KEY], where)
    alphas = {key: _number(metadata[key], key, where) for key in _ALPHAS if metadata.get(key, "None") != "None"}
    ranks = {key: _number(metadata[key], key, where) for key in _RANKS if metadata.get(key, "None") != "None"}
    for found in (alphas, ranks):
        if len(set(found.values())) > 1:
            raise BadFile(
                f"{where} says {', '.join(f'{key} = {value:g}' for key, value in found.items())}: which is it?"
            )
    if not alphas:
        return {}
    settings: dict[str, Any] = {"lora_alpha": next(iter(alphas.values()))}
    if ranks:
        settings["r"] = next(iter(ranks.values()))
    return settings


def _of_diffusers(text: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{where} has a {DIFFUSERS_KEY} that is not JSON: {str(error)[:100]}") from None
    if not isinstance(fields, dict):
        raise BadFile(f"{where} has a {DIFFUSERS_KEY} that is not a table of settings")
    # of one component (`transformer.lora_alpha`), or of the only one
    parts = {key.rpartition(".")[0] for key in fields}
    if len(parts) > 1:
        shown = ", ".join(sorted(map(repr, parts))[:4])
        raise BadFile(f"{where} is of several models ({shown}): adapters of image models are not taken")
    return {key.rpartition(".")[2]: value for key, value in fields.items()}


def _number(text: str, key: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise BadFile(f"{where} says {key} = {text[:40]!r}, which is not a number") from None
    if not math.isfinite(value):
        raise BadFile(f"{where} says {key} = {text[:40]!r}, which is not a finite number")
    return int(value) if value.is_integer() else value


def check_given(alpha: float | None, stored: float | None, where: str) -> None:
    """Raises InputError for an alpha that is not a number, or that is given for what says another."""
    if alpha is None:
        return
    if not math.isfinite(alpha):
        raise InputError(f"alpha is {alpha}: give the finite number the adapter was trained with")
    if stored is not None and stored != alpha:
        raise AlphaKnown(f"{where} says alpha {stored:g}, and --alpha {alpha:g} was given: leave --alpha out")


def ask(where: str, ranks: Mapping[str, int]) -> BadFile:
    """The error for a file that says nothing of its scale."""
    shown = sorted(set(ranks.values()))
    same = f", {shown[0]} for a scale of 1" if len(shown) == 1 else ""
    return BadFile(
        f"{where} does not carry its config, and nothing in it says the scale: put its {CONFIG} beside it, or give "
        f"--alpha (the lora_alpha it was trained with{same})"
    )
