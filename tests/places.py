"""Where tests keep their files: in memory where there is room, since a home on a disk waits for it at every flush.

What a disk does is not what tests look at: a process that is killed loses nothing that it wrote, flushed or not.
`PYTEST_DEBUG_TEMPROOT=/tmp make test` has them on the disk nevertheless.
"""

import os
import shutil
from pathlib import Path

MEMORY = Path("/dev/shm")
ROOM = 8 << 30  # bytes: several processes, each with bases and checkpoints of the test that runs


def is_roomy(folder: Path, room: int = ROOM) -> bool:
    """Whether this process may write there, may load a compiled kernel from there, and `room` bytes are free."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    return not os.statvfs(folder).f_flag & os.ST_NOEXEC and shutil.disk_usage(folder).free >= room
