"""Numbers with what they count, as people write them: `1 example`, `2,000 examples`."""


def counted(number: int, one: str, several: str | None = None) -> str:
    """The number with its noun: `one` for 1, else `several`, which is `one` with an s if it is not given."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"
