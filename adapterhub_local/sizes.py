"""Sizes of memory and bodies as people write them: `2GB` (powers of 1000) and `512MiB` (powers of 1024)."""

import re

from adapterhub_local.errors import InputError

UNITS: dict[str, int] = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
_BY_SPELLING = {unit.lower(): size for unit, size in UNITS.items()}


def parse_size(text: str, unit: str = "B") -> int:
    """The bytes that `text` stands for, rounded down; a number without a unit counts in `unit`.

    parse_size("2GB") == 2_000_000_000, parse_size("512MiB") == 512 << 20, parse_size("64", "MB") == 64_000_000.
    Raises InputError if it is not a size.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18})(?:\.([0-9]{1,15}))?\s*([A-Za-z]{0,3})\s*", text, re.ASCII)
    factor = _BY_SPELLING.get((match[3] or unit).lower()) if match else None
    if match is None or factor is None:
        raise InputError(
            f"'{text[:40]}' is not a size: write a number and one of {', '.join(UNITS)}, such as 512MiB or 2GB"
        )
    digits = match[2] or ""
    divisor: int = 10 ** len(digits)
    return int(match[1] + digits) * factor // divisor


def write_size(size: int) -> str:
    """`size` in the largest unit that holds it exactly, which `parse_size` reads back: 2GB, 256MiB, 1001B."""
    unit = max((unit for unit, factor in UNITS.items() if size % factor == 0), key=UNITS.__getitem__) if size else "B"
    return f"{size // UNITS[unit]}{unit}"
