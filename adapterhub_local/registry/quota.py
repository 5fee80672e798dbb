"""How much a home holds, and whether it may hold more: `max_bytes` of its config."""

import os
from pathlib import Path

from adapterhub_local.errors import OverQuota
from adapterhub_local.registry.config import read_config
from adapterhub_local.settings import Home
from adapterhub_local.sizes import write_size


def check_room(home: Home, incoming: int) -> None:
    """Raise OverQuota, with what takes the space and the way out, if this many more bytes do not fit into the home.

    Who publishes at the same moment is not counted. A home without `max_bytes` is not measured.
    """
    limit = read_config(home).max_bytes
    if limit is None:
        return
    parts = measure(home)
    total = sum(parts.values())
    if total + incoming <= limit:
        return
    shown = ", ".join(f"{name} {size:,}" for name, size in sorted(parts.items(), key=lambda part: -part[1])[:3] if size)
    raise OverQuota(
        f"the home may hold {write_size(limit)} (max_bytes in {home.config}), holds {total:,} bytes ({shown}) and "
        f"would need {incoming:,} more: nothing was registered. `qhub gc --keep N --apply`, `qhub runs rm` and "
        "`qhub base rm` free space, or raise max_bytes"
    )


def measure(home: Home) -> dict[str, int]:
    """Bytes of each folder and file of a home; of a file with several names once, in the first folder by name."""
    seen: set[tuple[int, int]] = set()
    parts: dict[str, int] = {}
    for entry in sorted(os.scandir(home.root), key=lambda one: one.name) if home.root.is_dir() else ():
        parts[entry.name] = sum(_size(path, seen) for path in _files(Path(entry.path)))
    return parts


def _files(path: Path) -> list[Path]:
    if not path.is_dir() or path.is_symlink():
        return [path]
    return [Path(folder, name) for folder, _, names in os.walk(path) for name in names]


def _size(path: Path, seen: set[tuple[int, int]]) -> int:
    try:
        status = path.lstat()
    except OSError:  # gone since
        return 0
    if status.st_nlink > 1:
        if (status.st_dev, status.st_ino) in seen:
            return 0
        seen.add((status.st_dev, status.st_ino))
    return status.st_size
