"""Labelled: metrics of several engines as one text for Prometheus, the samples of each with a label of its own.

A line is handed on as it is, but for the label: to read and write those of a thousand engines takes seconds.
"""

from collections.abc import Callable, Iterable


def labelled(texts: Iterable[tuple[str, str]], name: str | None, keeps: Callable[[str], bool] = lambda _: True) -> str:
    """Texts, each of an engine with the value of its label `name`, as one; a family stands together, as it must.

    Without a name samples stay as they are. Left out are families whose name `keeps` is false for.
    """
    families: dict[str, tuple[dict[str, str], list[str]]] = {}  # name -> its HELP and TYPE, and samples
    for value, text in texts:
        label = f'{name}="{_escaped(value)}"'
        about, samples = families.setdefault("", ({}, []))
        for line in text.split("\n"):
            if line.startswith(("# HELP ", "# TYPE ")):
                about, samples = families.setdefault(line.split(" ", 3)[2], ({}, []))
                about.setdefault(line[:6], line)
            elif line and line[0] != "#":
                samples.append(line if name is None else _with(line, label))
    lines = [
        f"{line}\n"
        for family, (about, samples) in families.items()
        if keeps(family)
        for line in (*about.values(), *samples)
    ]
    return "".join(lines)


def _with(sample: str, label: str) -> str:
    """A line with one more label, before those that it has."""
    place = sample.find("{")
    if place < 0:
        name, _, rest = sample.partition(" ")
        return f"{name}{{{label}}} {rest}"
    return f"{sample[: place + 1]}{label}{'' if sample[place + 1] == '}' else ','}{sample[place + 1 :]}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
