"""Processes: a process with all that it started, whatever groups and sessions they made for themselves."""

import ctypes
import os
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


def hold_to_modes() -> None:
    """For `preexec_fn`: the process is held to the modes of files, as a user is who is not root.

    The capabilities by which root passes over them are taken from the bounding set, so that what is executed next
    has them no more. Another user would not do: it could not read what root has installed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if os.geteuid() == 0 and libc.prctl(24, capability, 0, 0, 0) != 0:  # PR_CAPBSET_DROP
            raise OSError(ctypes.get_errno(), "root's rights over modes cannot be given up")
