"""Which filesystem a folder is on: SQLite's write-ahead log needs memory that all its users share, so one machine."""

import os
import re
from functools import lru_cache
from pathlib import Path

from adapterhub_local.errors import InputError

MOUNTS = Path("/proc/self/mountinfo")
# Where other machines write, too: locks may not reach them, and shared memory never does.
NETWORK = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "coda", "ceph", "lustre", "gfs2", "ocfs2", "beegfs",
     "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse", "fuse.mountpoint-s3",
     "fuse.juicefs", "gpfs")
)  # fmt: skip
_ESCAPE = re.compile(r"\\([0-7]{3})")


def check_local(folder: Path) -> None:
    """Raise InputError, with the way out, if a home that is to be written is on a network's filesystem."""
    kind = _kind_of(os.path.realpath(folder), MOUNTS)
    if kind in NETWORK:
        raise InputError(
            f"{folder} is on {kind}, where SQLite's database would be damaged by writers on several machines: set "
            "QHUB_HOME to a local disk, and share versions by `qhub remote add team <folder there>` and `qhub sync`"
        )


@lru_cache(maxsize=64)
def _kind_of(folder: str, mounts: Path) -> str | None:
    try:
        return filesystem_of(folder, mounts.read_text(errors="surrogateescape"))
    except OSError:  # not Linux
        return None


def filesystem_of(folder: str, mountinfo: str) -> str | None:
    """The kind of filesystem an absolute path is on, by the text of /proc/self/mountinfo; None if it does not say."""
    best, kind = "", None
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if not separator or len(fields) < 5:
            continue
        point = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), fields[4])
        is_below = folder == point or folder.startswith(point.rstrip("/") + "/")
        if is_below and len(point) >= len(best):  # the last of several mounts at one place is the one seen
            best, kind = point, after.split(" ")[0]
    return kind
