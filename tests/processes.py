"""Processes: a process with all that it started, whatever groups and sessions they made for themselves."""

from pathlib import Path


def family(pid: int) -> set[int]:
    """The process with this number and its descendants that live now."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, left = set(), [pid]
    while left:
        found.add(one := left.pop())
        left += children.get(one, ())
    return found
