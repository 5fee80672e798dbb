"""Numbers with what they count, as people write them: `1 example`, `2,000 examples`."""


def counted(number: int, one: str, several: str | None = None) -> str:
    """The number with its noun: `one` for 1, else `several`, which is `one` with an s if it is not given."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def thinned(last: int, growth: float) -> list[int]:
    """Whole numbers from 1 to `last`, both among them, each `growth` times the one before or the next there is."""
    found = [1] if last >= 1 else []
    while found and found[-1] < last:
        found.append(min(last, max(found[-1] + 1, int(found[-1] * growth))))
    return found
