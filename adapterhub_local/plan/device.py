"""What the device has: the memory asked about (`24GB`), else that of the GPU, else what is free on this machine.

torch is asked for the GPU, as training does: what nvidia-smi shows may be hidden from it, or of no use to its build.
"""

import re
from dataclasses import dataclass

from adapterhub_local import settings
from adapterhub_local.errors import InputError
from adapterhub_local.machine import available_memory, total_memory

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Device:
    """`kind` is cpu or cuda, `memory` the bytes a run may take, `name` what people call it.

    `whole` is all the memory it has, whatever is free now: what choices rest on that should not change by the hour.
    `has_bfloat16`: of a GPU, whether it multiplies that itself.
    """

    kind: str
    memory: int
    name: str
    whole: int
    has_bfloat16: bool = True


def parse_size(text: str) -> int:
    """`24GB`, `7.4GiB`, `900MB`: bytes. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    size = float(match[1]) * UNITS[match[2] or ""] if match else 0
    if not 1 <= size < 2**60:
        raise InputError(f"'{text}' is not a size of memory: write it as 24GB, 7.4GiB or 900MB")
    return int(size)


def find_device(gpu: str | None = None, ram: str | None = None) -> Device:
    """The device a run is planned for. A graphics card sold as 24GB has 24 GiB, so `gpu` is read that way.

    Raises InputError for sizes that are none, and if QHUB_DEVICE is cuda where there is no GPU.
    """
    if gpu and ram:
        raise InputError("--gpu and --ram exclude each other: a run is on one device")
    if gpu:
        return Device("cuda", _card(gpu), f"GPU of {gpu}", _card(gpu))
    if ram:
        return Device("cpu", parse_size(ram), f"CPU with {ram}", parse_size(ram))
    wanted = settings.device()
    if wanted != "cpu" and (found := _gpu()):
        return found
    if wanted == "cuda":
        raise InputError("QHUB_DEVICE is cuda and torch sees no GPU: give its memory, such as --gpu 24GB")
    return Device("cpu", available_memory(), "CPU", total_memory())


def _card(text: str) -> int:
    decimal = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*gb?\s*", text.lower())
    return parse_size(f"{decimal[1]}gib") if decimal else parse_size(text)


def _gpu() -> Device | None:
    """The GPU that training would use; None where torch sees none, whatever is built in."""
    import torch

    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Device("cuda", card.total_memory, card.name, card.total_memory, has_bfloat16)
